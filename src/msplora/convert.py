"""Conversion, files to files: an MSPLoRA adapter to a plain LoRA, or into the base's weights.

The result is written beside its place, compared with the adapter on the real model, and put in
place only then.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file

from .adapted import Adapted, load_adapted, load_on_base, put_on
from .classifier_head import labels_of
from .companions import complete_from_base, copy_companions
from .config import MSPLoraConfig
from .conversion_card import CARD_FILE, card_of_lora
from .errors import ConfigError, UnsupportedError
from .folders import check_apart, check_output, new_folder
from .foreseen import foresee
from .forms import PlainLora, Written, in_form
from .loading import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    BaseOptions,
    adapter_folder,
    base_named_by,
    check_finite,
    dtype_argument,
    dtype_named,
    quiet_loading,
    read_config,
    write_json,
)
from .merging import merge_layers, unloaded
from .on_shapes import load_on_shapes
from .plain_lora import Padding, check_padding, lora_of
from .probing import Probe, logits
from .proving import prove_lora, prove_merged
from .released import is_released, load_released
from .rewritten_base import CONVERT, RewrittenBaseWarning, not_repeated
from .server_limits import asked_server, check_served, features, why_not_served
from .serving import GGUF_FILE, SERVERS, Form
from .verifying import Comparison

# What of a LoRA's config gives its layers other scales than alpha / r.
_UNEVEN = ("use_rslora", "rank_pattern", "alpha_pattern")


class RoundedAwayWarning(UserWarning):
    """A merged model whose dtype keeps little of the adapter."""


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote, and how it was proved."""

    out: Path
    rank: int
    """The rank of the plain LoRA."""
    source_bytes: int
    out_bytes: int
    comparison: Comparison | None
    """`None` if the check was skipped."""
    base: str | None = None
    """The base model's path or hub id."""
    generates: bool = False
    """Whether it is a language model, which LoRA servers take."""
    not_served: dict[str, str] = field(default_factory=dict)
    """Of `serving.SERVERS`, those that read this form but not this adapter -> why."""


def to_lora(
    source: str | Path,
    out: str | Path,
    *,
    base: str | BaseOptions | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    pad_to: Padding = "none",
    server: str | None = None,
    max_lora_rank: int | None = None,
    form: Form = "lora",
    verify: bool = True,
    force: bool = False,
) -> Converted:
    """Write an MSPLoRA adapter as a plain LoRA that PEFT and every LoRA server reads.

    Args:
        source: the adapter's folder, or a run's.
        out: the folder to write.
        base: the base model, or how to load it; the adapter names it.
        dtype: of the tensors written.
        pad_to: "pow2" pads the rank with zeros to a power of two, a number to that rank.
        server: refuse what this one of `serving.SERVERS` cannot serve.
        max_lora_rank: the largest rank that the server is started for, if it has such a flag.
        form: "gguf" writes llama.cpp's file and "mlx" mlx-lm's folder, in place of PEFT's.
        verify: load base and result with PEFT, and compare every update and the logits before the
            result takes its place. Without, the base's weights are not loaded, unless the adapter
            has DoRA or brings embeddings along.
        force: replace `out` if it is an earlier conversion, as it was written.

    Raises:
        MSPLoraError: the adapter or its base cannot be read, or the result is not the same.
    """
    if form not in (forms := get_args(Form)):
        raise ConfigError(f"no form {form!r} of a LoRA; there are {', '.join(forms)}.")
    asked = asked_server(server, form, max_lora_rank)
    check_padding(pad_to)
    stored = dtype_named(dtype)
    folder, out = adapter_folder(Path(source)), Path(out).expanduser()
    options = BaseOptions.of(base)
    check_apart(out, folders_read(folder, options))
    check_output(out, force)
    if out.suffix == ".gguf":
        raise ConfigError(
            f"the output {str(out)!r} is a folder, in which the file is {GGUF_FILE}; give a "
            f"folder's name."
        )
    if not is_released(folder):
        foresee(
            _pyramid_in(folder, form),
            options,
            form=form,
            pad_to=pad_to,
            server=asked,
            max_lora_rank=max_lora_rank,
        )
    adapted = _load_pyramid(folder, options, weights=verify)
    tensors, config = lora_of(adapted.model, dtype=stored, pad_to=pad_to)
    holds = features(adapted.model, adapted.others)
    if asked is not None:
        check_served(holds, asked, config["r"], max_lora_rank)
    own: Any = next(iter(adapted.model.peft_config.values()))
    config["base_model_name_or_path"], config["revision"] = options.recorded_for(own)
    tensors |= adapted.others
    check_finite(tensors, f"the LoRA in {dtype}")
    base_config: Any = adapted.model.get_base_model().config
    written = in_form(form, PlainLora(tensors, config, base_config))
    with new_folder(out, force, made_from=folder.name) as partial:
        written.write(partial)
        if form == "lora":
            card = card_of_lora(
                config, folder.name, holds, adapted.vocabulary, labels_of(adapted.model)
            )
            (partial / CARD_FILE).write_text(card, encoding="utf-8")
            copy_companions(folder, partial)
        comparison = None
        if verify:
            comparison = prove_lora(
                adapted,
                lambda bare: _with_lora(bare, written, partial, config),
                stored,
                lambda: _load_pyramid(folder, replace(options, dtype="float32")),
            )
    return Converted(
        out,
        config["r"],
        _size_of_adapter(folder),
        _size(out / written.weights_file),
        comparison,
        base=config["base_model_name_or_path"],
        generates=config["task_type"] == "CAUSAL_LM",
        not_served={
            name: why
            for name, its in SERVERS.items()
            if its.form == form and (why := why_not_served(holds, its, config["r"]))
        },
    )


def to_merged(
    source: str | Path,
    out: str | Path,
    *,
    base: str | BaseOptions | None = None,
    verify: bool = True,
    allow_quantized: bool = False,
    force: bool = False,
) -> Converted:
    """Add an adapter into its base's weights and save the whole model, without any adapter.

    Args:
        source: the adapter's folder, or a run's.
        out: the folder to write.
        base: the base model, or how to load it, its dtype included; the adapter names it.
        verify: hold every merged weight against base and update, then load the result and compare
            the logits before it takes its place. What rounding to the base's dtype takes is said;
            `RoundedAwayWarning` where that is most of the adapter, and `RewrittenBaseWarning` of a
            LoRA that no loading gives back as it was trained.
        allow_quantized: merge into a quantised base, which rounds the sum again.
        force: replace `out` if it is an earlier conversion, as it was written.

    Raises:
        MSPLoraError: the adapter or its base cannot be read, or the result is not the same.
    """
    folder, out = adapter_folder(Path(source)), Path(out).expanduser()
    options = BaseOptions.of(base)
    check_apart(out, folders_read(folder, options))
    check_output(out, force)
    _check_merges(folder)
    model = _load_model(folder, options)
    base_model: Any = model.get_base_model()
    dtype = base_model.dtype
    if getattr(base_model, "is_quantized", False) and not allow_quantized:
        raise UnsupportedError(
            "the base is quantised: merging would round its weights a second time. Pass --base "
            "with the unquantised model, or --allow-quantized to accept that."
        )
    probe = Probe(model) if verify else None
    rank = sum(_ranks(model))
    own: Any = next(iter(model.peft_config.values()))
    source_of_base, revision = options.recorded_for(own)
    rounding = merge_layers(model)
    merged: Any = unloaded(model)
    model_class = type(merged)
    with new_folder(out, force, made_from=folder.name) as partial:
        with quiet_loading():
            merged.save_pretrained(partial)
        copy_companions(folder, partial)
        if source_of_base:
            complete_from_base(source_of_base, revision, partial)
        comparison = None
        answers = logits(merged, probe.inputs) if probe is not None else None
        del model, base_model, merged  # so that the reloaded model is not a second one in memory
        if probe is not None and answers is not None:
            comparison = prove_merged(
                probe,
                rounding,
                answers,
                _reloaded(model_class, partial, dtype),
                lambda: _load_model(folder, replace(options, dtype="float32")),
            )
            if comparison.rounded_away:
                warnings.warn(comparison.rounded_away, RoundedAwayWarning, stacklevel=2)
    size = sum(_size(file) for file in out.glob("*.safetensors"))
    return Converted(out, rank, _size_of_adapter(folder), size, comparison)


def _load_model(folder: Path, base: BaseOptions) -> PeftModel:
    return load_released(folder, base)[0] if is_released(folder) else load_adapted(folder, base)


def _reloaded(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    with quiet_loading():
        return model_class.from_pretrained(folder, **{dtype_argument(): dtype}).eval()


def _check_merges(folder: Path) -> None:
    """Refuse methods that PEFT cannot merge beside a head that was trained in full."""
    if is_released(folder):
        return
    config = read_config(folder)
    if not isinstance(config, LoraConfig):
        kind = str(config.peft_type).rpartition(".")[2]
        raise UnsupportedError(
            f"{str(folder)!r} is a {kind} adapter; --to merged takes those of MSPLoRA and LoRA, "
            f"and of Hydra, ElaLoRA and AdaLoRA. Use it through PEFT, unmerged."
        )
    if why := not_repeated(config):
        warnings.warn(
            f"{str(folder)!r}: {why} Nor does merging it. {CONVERT}",
            RewrittenBaseWarning,
            stacklevel=3,
        )


def _with_lora(base: Any, written: Written, folder: Path, config: dict[str, Any]) -> PeftModel:
    """The base with the LoRA that the written files hold, loaded by PEFT."""
    with tempfile.TemporaryDirectory() as scratch:
        if (folder / WEIGHTS_FILE).is_file():
            return put_on(base, folder)
        save_file(written.read(folder), Path(scratch) / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(Path(scratch) / CONFIG_FILE, config)
        return put_on(base, Path(scratch))


def folders_read(folder: Path, base: BaseOptions) -> list[Path]:
    """The folders a conversion reads, which its output must not replace."""
    source = base.source or base_named_by(folder)
    place = Path(source).expanduser() if source else folder
    return [folder, *([place] if place.is_dir() else [])]


def _load_pyramid(folder: Path, base: BaseOptions, *, weights: bool = True) -> Adapted:
    """The adapted model, and what the adapter's file holds.

    Args:
        folder: the adapter's.
        base: the base model.
        weights: whether the base's are needed; without, they are loaded if they have to be.
    """
    if is_released(folder):
        return Adapted(*load_released(folder, base))
    return (None if weights else load_on_shapes(folder, base)) or load_on_base(folder, base)


def _pyramid_in(folder: Path, form: Form) -> MSPLoraConfig:
    config: Any = read_config(folder)
    if isinstance(config, MSPLoraConfig):
        return config
    kind = str(config.peft_type).rpartition(".")[2]
    if kind != "LORA":
        way = "merge it: --to merged" if isinstance(config, LoraConfig) else "use it through PEFT"
        raise ConfigError(
            f"{str(folder)!r} is of type {kind}, and --to {form} takes MSPLoRA adapters; {way}."
        )
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    if form == "lora":
        uneven = [name for name in _UNEVEN if getattr(config, name)]
        if config.use_dora:
            told = "but with DoRA, which most servers do not. Merge it for those: --to merged."
        elif uneven:
            told = (
                f"but with {' and '.join(uneven)}, which not every server minds. Make it a pyramid "
                f"with a pair for each layer, which is the same: --to msplora --ranks {rank} "
                f"--groups 0. Converted to a LoRA, that has one rank and one alpha for all layers."
            )
        else:
            told = "with one rank and one alpha: there is nothing to convert."
        raise ConfigError(
            f"{str(folder)!r} is a plain LoRA already. PEFT reads it as it is, {told}"
        )
    raise ConfigError(
        f"{str(folder)!r} is a plain LoRA, and --to {form} takes a pyramid. Make it one with a "
        f"pair for each layer, which is the same: --to msplora --ranks {rank} --groups 0. Convert "
        f"that."
    )


def _ranks(model: Any) -> list[int]:
    config = next(iter(model.peft_config.values()))
    return list(getattr(config, "ranks", None) or [config.r])


def _size_of_adapter(folder: Path) -> int:
    return sum(_size(file) for file in folder.glob("adapter_model.*"))


def _size(file: Path) -> int:
    return file.stat().st_size
