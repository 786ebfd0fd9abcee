"""Back from LoRA, files to files: the best pyramid for an adapter that exists.

The adapter is loaded on its base by PEFT, so whatever gives a layer its rank and scale (patterns,
rank-stabilised scaling, a transposed weight) has been dealt with; `fitting.py` finds the pairs
kind by kind. What is written is loaded again by PEFT, and the share of each update that it
explains is measured on that, before it is put in place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from . import _peft
from .adapted import Adapted, embeddings_of, load_on_base
from .blocks import place
from .classifier_head import labels_of
from .companions import copy_companions
from .config import MSPLoraConfig
from .conversion_card import CARD_FILE, card_of_pyramid
from .convert import folders_read
from .errors import ConfigError, TargetError, UnsupportedError, nearest_path
from .explained import Explained, explain, measure, numbers_in_pairs, total
from .fitting import Shared, fit
from .folders import check_apart, check_output, new_folder
from .loading import (
    WEIGHTS_FILE,
    BaseOptions,
    adapter_folder,
    check_finite,
    dtype_named,
    read_config,
)
from .matching import STORE_NAME, model_type_of
from .planning import plan
from .pyramid import Kind, Pair, Plan
from .released import is_released, load_released
from .store import A, B, name_in_file
from .updates import Blocks, is_out_proj, laid_out, module_of, norm_of, sums_of, updates_of
from .verifying import Comparison

_REWRITE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass(frozen=True)
class Fitted:
    """What `to_msplora` wrote, and how near it comes."""

    out: Path
    ranks: list[int]
    groups: list[int]
    sites: tuple[Explained, ...]
    explained: float
    """The share of the squared norm of all updates together."""
    parameters: int
    source_parameters: int
    """The numbers in the pairs of the adapter it was made from."""
    sweeps: int
    """Of alternating least squares, the most that a kind took."""
    converged: bool
    left_out: tuple[str, ...]
    """Sites that the adapter does not change."""
    comparison: Comparison | None
    """Of the logits with the source's; `None` if the check was skipped."""
    loss: tuple[float, float] | None
    """On the data, if there were any: of the source, and of the pyramid."""
    source_bytes: int
    out_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can write it."""
        content: dict[str, Any] = asdict(self) | {"out": str(self.out)}
        if self.comparison is not None and math.isinf(self.comparison.tolerance):
            content["comparison"]["tolerance"] = None  # JSON has no infinity
        return content


def to_msplora(
    source: str | Path,
    out: str | Path,
    *,
    r: int | None = None,
    ranks: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
    levels: Sequence[str] | None = None,
    base: str | BaseOptions | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    data: str | None = None,
    verify: bool = True,
    force: bool = False,
) -> Fitted:
    """Write the pyramid that comes nearest to an adapter: a LoRA, or a pyramid of other ranks.

    Nearest in the sum over the layers of the squared Frobenius norm of what is missing. A
    checkpoint of the code released with the paper becomes, without ranks, the pyramid of one level
    that computes the same; with ranks, the nearest one.

    Args:
        source: the adapter's folder, or a run's.
        out: the folder to write.
        r: rank of the first level, the others as in `MSPLoraConfig`; a LoRA's own rank if neither
            `r` nor `ranks` is given.
        ranks: rank of each level.
        groups: groups of each level, 0 for a pair per layer.
        levels: the levels' names.
        base: the base model, or how to load it; the adapter names it.
        dtype: of the tensors written.
        data: a file, as `msplora eval --data` takes it, to measure the loss of both on.
        verify: load the result with PEFT, measure it and compare the logits before it is kept.
        force: replace `out` if it is an earlier conversion, as it was written.

    Raises:
        MSPLoraError: the adapter or its base cannot be read, the adapter does what a pyramid
            cannot, or what was written is not what was found.
    """
    folder, out = adapter_folder(Path(source)), Path(out).expanduser()
    options = BaseOptions.of(base)
    check_apart(out, folders_read(folder, options))
    check_output(out, force)
    shape: dict[str, Any] = {"r": r, "ranks": ranks, "groups": groups, "levels": levels}
    shape = {key: its if key == "r" else list(its) for key, its in shape.items() if its is not None}
    stored = dtype_named(dtype)
    shape = _shape_to_find(folder, shape)
    if data is not None and not Path(data).exists():
        raise ConfigError(f"the data file {data!r} does not exist.{nearest_path(Path(data))}")
    before = None if data is None else _loss_of_source(folder, data, options)
    adapted, shape = _load(folder, options, shape)
    model, others = adapted.model, adapted.others
    updates = dict(updates_of(model))
    changed = {key: its for key, its in updates.items() if norm_of(its) > 0}
    if not changed:
        raise UnsupportedError(
            f"every update of {str(folder)!r} is zero: there is nothing to fit. Was it trained?"
        )
    numbers = numbers_in_pairs(model, updates)
    config = _config(model, changed, shape)
    found = plan(model, config)
    pairs, sweeps, converged = fitted_pairs(found, changed)
    tensors = {
        f"base_model.model.{STORE_NAME}.{name_in_file(pair.address, name)}": tensor
        for pair in found.pairs
        for name, tensor in zip((A, B), pairs[pair.address], strict=True)
    }
    tensors = {key: its.to(stored).contiguous() for key, its in tensors.items()}
    tensors |= others
    check_finite(tensors, f"the pyramid in {dtype}")
    config.model_type, config.fingerprint = model_type_of(model.get_base_model()), found.fingerprint
    recorded = options.recorded_for(config)
    config.base_model_name_or_path, config.revision = recorded
    expected = explain(found, changed, sums_of(found, pairs))
    with new_folder(out, force, made_from=folder.name) as partial:
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(partial))
        copy_companions(folder, partial)
        card = card_of_pyramid(config, found, folder.name, total(expected), labels_of(model))
        (partial / CARD_FILE).write_text(card, encoding="utf-8")
        comparison = None
        if verify:
            del model  # which is taken apart
            expected, comparison = measure(
                adapted,
                partial,
                found,
                changed,
                expected,
                dtype,
                lambda: _load(folder, replace(options, dtype="float32"), shape)[0],
            )
        after = None if data is None else _loss(partial, data, options)
    return Fitted(
        out=out,
        ranks=list(config.ranks or ()),
        groups=list(config.groups or ()),
        sites=tuple(expected),
        explained=total(expected),
        parameters=found.parameters,
        source_parameters=numbers,
        sweeps=sweeps,
        converged=converged,
        left_out=tuple(sorted(set(updates) - set(changed))),
        comparison=comparison,
        loss=None if before is None or after is None else (before, after),
        source_bytes=sum(file.stat().st_size for file in folder.glob("adapter_model.*")),
        out_bytes=(out / WEIGHTS_FILE).stat().st_size,
    )


# What there is


def _shape_to_find(folder: Path, shape: dict[str, Any]) -> dict[str, Any]:
    """The shape that is asked for, or follows from the adapter, as far as its config says.

    Raises:
        MSPLoraError: there can be no such pyramid, or none of this adapter.
    """
    if is_released(folder):
        if shape:
            MSPLoraConfig(target_modules=[], **shape)
        return shape
    config: Any = read_config(folder)
    _refuse(config, folder)
    if not {"r", "ranks"} & set(shape):
        if isinstance(config, MSPLoraConfig):
            raise ConfigError(
                f"{str(folder)!r} is a pyramid already, of ranks {config.ranks}. Say with --ranks "
                f"(or --r) which ranks it is to have."
            )
        shape = {**shape, "r": max([config.r, *(config.rank_pattern or {}).values()])}
    MSPLoraConfig(**_kept(config), **shape)
    return shape


def _load(folder: Path, base: BaseOptions, shape: dict[str, Any]) -> tuple[Adapted, dict[str, Any]]:
    """The adapted model, and the shape of the pyramid to find."""
    if is_released(folder):
        adapted = Adapted(*load_released(folder, base))
        released: Any = adapted.model.peft_config["default"]
        own = {name: getattr(released, name) for name in ("levels", "ranks", "groups")}
        return adapted, shape or own
    adapted = load_on_base(folder, base)
    _refuse_tied(adapted.model, folder)
    return adapted, shape


def _refuse(config: Any, folder: Path) -> None:
    if not isinstance(config, LoraConfig):
        kind = str(config.peft_type).rpartition(".")[2]
        raise UnsupportedError(
            f"{str(folder)!r} is a {kind} adapter; a pyramid can be made of a LoRA, of another "
            f"pyramid, or of a checkpoint of the released code."
        )
    if config.use_dora:
        raise UnsupportedError(
            f"{str(folder)!r} uses DoRA, which scales the sum of weight and update: the update "
            f"alone says nothing of it. Merge it into its base instead."
        )
    if config.bias != "none":
        raise UnsupportedError(
            f"{str(folder)!r} was trained with bias = {config.bias!r}, which belongs to its layers "
            f"and to no pair. Merge it into its base instead."
        )
    init = str(config.init_lora_weights).lower()
    if init.startswith(_REWRITE_THE_BASE):
        raise UnsupportedError(
            f"{str(folder)!r} has init_lora_weights = {config.init_lora_weights!r}, which changes "
            f"the base's weights: it is no update of the base alone. Save it with PEFT's "
            f"path_initial_model_for_weight_conversion first, which makes a plain LoRA of it."
        )
    if getattr(config, "ensure_weight_tying", False):
        raise UnsupportedError(
            f"{str(folder)!r} has ensure_weight_tying: two layers with one weight, each with its "
            f"own way round. Leave it a LoRA, or merge it into its base."
        )


def _refuse_tied(model: Any, folder: Path) -> None:
    """A head and an embedding with one weight, of which the LoRA adapts one."""
    both = list(embeddings_of(model.get_base_model()))
    bare: list[Any] = [_peft.unwrapped(its) for _, its in both]
    if len(both) < 2 or bare[0].weight is not bare[1].weight:
        return
    for path, its in both:
        if isinstance(its, _peft.BaseTunerLayer):
            raise UnsupportedError(
                f"{str(folder)!r} adapts {path!r}, whose weight is "
                f"{next(other for other, _ in both if other != path)!r}'s too: a pyramid adapts "
                f"both or none. Leave it a LoRA, or merge it into its base (--to merged), which "
                f"unties them."
            )


def _config(model: Any, changed: Mapping[str, Blocks], shape: Mapping[str, Any]) -> MSPLoraConfig:
    """The pyramid's config: the source's, with other ranks, for the sites that it changes."""
    own: Any = next(iter(model.peft_config.values()))
    kept = _kept(own)
    parameters = [key for key in changed if module_of(model.get_base_model(), key) is None]
    modules = [key for key in changed if key not in parameters]
    modules = [key for key in modules if not is_out_proj(model.get_base_model(), key)]
    exact = {
        "target_modules": modules or None,
        "target_parameters": parameters or None,
        "exclude_modules": None,
        # With the layers that are named the groups are cut by the pattern too, so it stays.
        "layers_to_transform": _every_layer(model.get_base_model(), [*changed], own),
    }
    for targets in ({}, exact):
        config = MSPLoraConfig(**(kept | targets), **shape, inference_mode=True)
        try:
            sites = {site.key for site in plan(model, config).sites}
        except TargetError:
            if targets:
                raise
            continue
        if sites == set(changed):
            return config
    raise TargetError(
        f"the adapter changes {len(changed)} weights, but a pyramid on them would have "
        f"{len(sites)}: {sorted(sites ^ set(changed))[0]!r} is in one of them only."
    )


def _kept(config: Any) -> dict[str, Any]:
    """What a pyramid's config takes over from its source's."""
    return {
        name: getattr(config, name)
        for name, field in LoraConfig.__dataclass_fields__.items()
        if name not in _NOT_KEPT and field.init
    }


def _every_layer(root: Any, keys: Sequence[str], own: Any) -> list[int] | None:
    """The blocks of the sites, where a config has a pattern for the lists they lie in."""
    pattern = own.layers_pattern
    blocks = {place(root, key, pattern)[1] for key in keys} if pattern else set()
    return sorted(block for block in blocks if block is not None) or None


_NOT_KEPT = {
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
    "inference_mode",
    "peft_type",
    "runtime_config",
    "eva_config",
}


# The fit


def fitted_pairs(
    found: Plan, updates: Mapping[str, Blocks]
) -> tuple[dict[str, tuple[Tensor, Tensor]], int, bool]:
    """The tensors of every pair by address; the most sweeps; whether all kinds converged."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    sweeps, converged = 0, True
    of_kind: dict[str, list[Pair]] = {}
    for pair in found.pairs:
        of_kind.setdefault(pair.kind, []).append(pair)
    for kind in found.kinds:
        # The most shared first, whatever the order of the levels.
        own = sorted(of_kind.get(kind.name, ()), key=_shared_by)
        blocks: list[Blocks] = []
        for block in range(kind.shape.blocks):
            fitted = fit(
                [updates[site.key][block] for site in kind.sites],
                [_wanted(pair, kind) for pair in own],
            )
            blocks.append(list(fitted.pairs))
            sweeps = max(sweeps, len(fitted.history) - 1)
            converged = converged and fitted.converged
        for pair, of_blocks in zip(own, zip(*blocks, strict=True), strict=True):
            pairs[pair.address] = laid_out(pair, list(of_blocks))
    return pairs, sweeps, converged


def _shared_by(pair: Pair) -> int:
    return -len(pair.sites)


def _wanted(pair: Pair, kind: Kind) -> Shared:
    places = {site.key: place for place, site in enumerate(kind.sites)}
    rank = pair.rank // pair.shape.blocks if pair.shape.layout == "conv" else pair.rank
    return Shared(rank, tuple(places[key] for key in pair.sites))


# The loss


def _loss_of_source(folder: Path, data: str, base: BaseOptions) -> float:
    if not is_released(folder):
        return _loss(folder, data, base)
    with TemporaryDirectory() as nowhere:
        same = to_msplora(folder, Path(nowhere) / "same", base=base, verify=False)
        return _loss(same.out, data, base)


def _loss(folder: Path, data: str, base: BaseOptions) -> float:
    from .extras import train_extra

    with train_extra():
        from .train.evaluation import evaluate_run

        found = evaluate_run(folder, data, base)
    return float(found["loss"])
