"""From a model and a config to the plan: which weights are sites, and where they lie."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import _peft
from .config import MSPLoraConfig
from .errors import TargetError, nearest
from .pyramid import Level, Plan, Shape, Site, arrange

STORE_NAME = "pyramid_store"
"""The attribute of the wrapped base model under which the store is registered."""


def plan(model: Any, config: MSPLoraConfig) -> Plan:
    """Say what `config` would adapt and share in `model`, without touching either.

    Args:
        model: a `torch.nn.Module`, on any device (the meta device included), with or without
            adapters; or a transformers `PretrainedConfig`, of which the model is then built on the
            meta device, so that no weight is allocated.
        config: the pyramid asked for.

    Returns:
        The frozen plan: print it, or read its `sites`, `pairs`, `parameters`, `lora_parameters`.

    Raises:
        TargetError: a target, layer index or pattern that matches nothing, or that cannot be
            adapted.
    """
    if not isinstance(model, nn.Module):
        model = on_meta(model)
    model = _base_model(model)
    return make_plan(model, prepared(model, config))


def on_meta(model_config: Any) -> nn.Module:
    """Build the model of a transformers config on the meta device: shapes without storage."""
    import transformers

    architectures = getattr(model_config, "architectures", None) or []
    classes = [getattr(transformers, name, None) for name in architectures]
    with torch.device("meta"):
        if classes and classes[0] is not None:
            model = classes[0](model_config)
        else:
            model = transformers.AutoModel.from_config(model_config)
    model.tie_weights()
    return model


def prepared(model: nn.Module, config: MSPLoraConfig) -> MSPLoraConfig:
    """A copy of `config` whose `target_modules` are spelled out as PEFT would."""
    config = copy.copy(config)
    if config.target_modules is None and not config.target_parameters:
        model_type = _model_type(model)
        default = _peft.DEFAULT_TARGETS.get(model_type or "")
        if default is None:
            raise TargetError(
                f"target_modules is not set, and PEFT has no default for "
                f"{model_type or type(model).__name__!r}. Name some of this model's modules: "
                f"{_some(_leaf_names(model))}; or use 'all-linear'."
            )
        config.target_modules = default if isinstance(default, str) else set(default)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        _peft.include_all_linear(config, model)
        # PEFT counts the first as linear layers, but their attention reads the weight directly, so
        # an adapter on them would never act; the second it means to train whole.
        config.target_modules = {
            key
            for key in config.target_modules
            if not _inside_attention(model, key) and _trained_whole(config, key) is None
        }
    return config


def make_plan(model: nn.Module, config: MSPLoraConfig) -> Plan:
    """The plan of a prepared config."""
    targets = _targets(model, config)
    _check_everything_matched(model, config, targets)
    tied = _tied_sites(model, config, targets)
    sites = [_site(model, config, target) for target in targets if target.key not in tied]
    return arrange(
        sites,
        config.pyramid,
        levels_of=_levels_of(config, sites),
        use_dora=config.use_dora,
        tied=tied,
        notes=_notes(sites, tied),
    )


@dataclass(frozen=True)
class _Target:
    key: str
    path: str
    """The module that is adapted, or that holds the parameter."""
    module: nn.Module
    shape: Shape


def _targets(model: nn.Module, config: MSPLoraConfig) -> list[_Target]:
    found = []
    for path, module in _own_modules(model):
        if path and _peft.is_target(config, path):
            found += _module_targets(model, path, _peft.unwrapped(module))
    for path, module in _own_modules(model):
        base = _peft.unwrapped(module)
        for name, _ in base.named_parameters(recurse=False):
            key = f"{path}.{name}"
            if _parameter_matches(config, key):
                found.append(_Target(key, path, base, _parameter_shape(base, path, name)))
    return found


def _own_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The base model's modules: not what lies inside adapter layers, nor the store."""
    inside: tuple[str, ...] = (f"{STORE_NAME}.",)
    for path, module in model.named_modules():
        if path == STORE_NAME or path.startswith(inside):
            continue
        if isinstance(module, (_peft.BaseTunerLayer, _peft.AuxiliaryTrainingWrapper)):
            inside += (f"{path}.",)
        yield path, module


def _parameter_matches(config: MSPLoraConfig, key: str) -> bool:
    return any(
        key == target or key.endswith(f".{target}") for target in config.target_parameters or ()
    )


def _module_targets(model: nn.Module, path: str, module: nn.Module) -> list[_Target]:
    if _inside_attention(model, path):
        parent = path.rpartition(".")[0]
        raise TargetError(
            f"{path!r} lies in an nn.MultiheadAttention, which reads its weight directly, so an "
            f"adapter on it would never act. Target the attention itself ({parent!r}): both its "
            f"projections are adapted then."
        )
    if isinstance(module, nn.MultiheadAttention):
        size = module.embed_dim
        return [
            _Target(path, path, module, Shape("linear", 3 * size, size)),
            _Target(f"{path}.out_proj", path, module, Shape("linear", size, size)),
        ]
    return [_Target(path, path, module, _module_shape(path, module))]


def _trained_whole(config: MSPLoraConfig, key: str) -> str | None:
    """The entry of `modules_to_save` that takes `key` too: PEFT goes by how a name ends."""
    return next((name for name in config.modules_to_save or () if key.endswith(name)), None)


def _module_shape(path: str, module: nn.Module) -> Shape:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        for name, usual in (("dilation", {1}), ("padding_mode", {"zeros"})):
            value = getattr(module, name)
            if not usual.issuperset(value if isinstance(value, tuple) else (value,)):
                raise TargetError(
                    f"{path!r} is a convolution with {name}={value!r}, which PEFT's LoRA does not "
                    f"apply to its own convolution. Leave it out with exclude_modules."
                )
        return Shape(
            "conv", module.out_channels, module.in_channels, module.kernel_size, module.groups
        )
    in_features, out_features = _peft.in_out_features(module)
    if in_features is None or out_features is None:
        inner = [f"{path}.{name}" for name, _ in module.named_children()]
        hint = f" Inside it are {_some(inner)}." if inner else ""
        raise TargetError(
            f"{path!r} is a {type(module).__name__}, which has no weight that LoRA can adapt. "
            f"Target linear layers, convolutions, embeddings or nn.MultiheadAttention.{hint}"
        )
    layout = "embedding" if isinstance(module, nn.Embedding) else "linear"
    return Shape(layout, out_features, in_features)


def _parameter_shape(module: nn.Module, path: str, name: str) -> Shape:
    parameter = getattr(module, name)
    if parameter.ndim not in (2, 3):
        raise TargetError(
            f"target_parameters matches '{path}.{name}', which has {parameter.ndim} dimensions; "
            f"parameters of 2 (a weight) or 3 (experts) can be adapted."
        )
    experts, out_features, in_features = _peft.parameter_shape(module, name)
    return Shape("experts", out_features, in_features, blocks=experts)


def _site(model: nn.Module, config: MSPLoraConfig, target: _Target) -> Site:
    stack, block, kind = place(model, target.key, config.layers_pattern)
    return Site(target.key, stack, kind, block, target.shape)


def place(
    model: nn.Module, key: str, layers_pattern: list[str] | str | None = None
) -> tuple[str, int | None, str]:
    """Where a site lies: the path of its list of blocks, its block's number, the path inside it.

    The list is the outermost `ModuleList` or `Sequential` with numbered children on the way, or
    what `layers_pattern` names. A site outside every list is a stack of its own.
    """
    names = key.split(".")
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or []
    module: Any = model
    for place_, name in enumerate(names):
        if name.isdigit():
            path = ".".join(names[:place_])
            if patterns:
                is_list = any(re.search(rf"(^|\.){pattern}$", path) for pattern in patterns)
            else:
                is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
            if is_list:
                return path, int(name), ".".join(names[place_ + 1 :]) or "self"
        module = _peft.unwrapped(getattr(module, name)) if hasattr(module, name) else None
    return key, None, key


def _levels_of(config: MSPLoraConfig, sites: list[Site]) -> dict[str, tuple[Level, ...]]:
    found = {}
    for site in sites:
        rank = _pattern_value(config.rank_pattern, site.key)
        alpha = _pattern_value(config.alpha_pattern, site.key)
        if rank is not None or alpha is not None:
            found[site.key] = config.pyramid_with(rank, alpha)
    return found


def _pattern_value(patterns: dict | None, key: str) -> Any:
    """The value of the first pattern that matches `key`, as PEFT matches it."""
    for pattern, value in (patterns or {}).items():
        if _pattern_matches(pattern, key):
            return value
    return None


def _pattern_matches(pattern: str, key: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", key) is not None


def _tied_sites(model: nn.Module, config: MSPLoraConfig, targets: list[_Target]) -> dict[str, str]:
    """Key of a tied head -> key of the embedding whose pairs it borrows (`ensure_weight_tying`)."""
    embedding = _input_embedding(model)
    if embedding is None:
        return {}
    name, weight = embedding
    heads = [
        path
        for path, module in _own_modules(model)
        if path != name
        and isinstance(base := _peft.unwrapped(module), (nn.Linear, nn.Embedding))
        and base.weight is weight
    ]
    targeted = {target.key for target in targets}
    if not heads or not targeted & {name, *heads}:
        return {}
    if not config.ensure_weight_tying:
        asked = sorted(targeted & {name, *heads})
        raise TargetError(
            f"target_modules matches {asked}, whose weight is shared by {[name, *heads]}: adapting "
            f"one would untie them. Set ensure_weight_tying=True to adapt all of them alike, load "
            f"the model with tie_word_embeddings=False, or leave them out."
        )
    if name not in targeted:
        raise TargetError(
            f"target_modules matches {sorted(targeted & set(heads))}, tied to {name!r}. With "
            f"ensure_weight_tying=True name the embedding {name!r} too: it owns the pairs."
        )
    if config.use_dora:
        raise TargetError(
            f"use_dora does not work on {[name, *heads]}, which share one weight: each would "
            f"normalise it along another axis. Leave them out, or set use_dora=False."
        )
    return dict.fromkeys(heads, name)


def _input_embedding(model: Any) -> tuple[str, Tensor] | None:
    try:
        module = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    base: Any = _peft.unwrapped(module)
    if not isinstance(base, nn.Embedding):
        return None
    path = next(path for path, its in model.named_modules() if its is module)
    return path, base.weight


def _notes(sites: list[Site], tied: dict[str, str]) -> list[str]:
    alone = sorted({site.key for site in sites if site.block is None})
    notes = []
    if alone:
        notes.append(
            f"{', '.join(alone)}: outside every list of blocks, so nothing shares with "
            f"{'it' if len(alone) == 1 else 'them'}."
        )
    notes += [
        f"{head}: tied to {embedding}, borrows its pairs." for head, embedding in tied.items()
    ]
    notes += _gaps(sites)
    return notes


def _gaps(sites: list[Site]) -> list[str]:
    """Kinds that skip blocks of their stack, so that depth and block number differ."""
    blocks: dict[tuple[str, str], list[int]] = {}
    for site in sites:
        if site.block is not None:
            blocks.setdefault((site.stack, site.kind), []).append(site.block)
    notes = []
    for (stack, kind), found in sorted(blocks.items()):
        missing = sorted(set(range(max(found) + 1)) - set(found))
        if missing:
            notes.append(
                f"{stack} … {kind}: blocks {missing} are not adapted; groups and the local level "
                f"count the {len(found)} that are."
            )
    return notes


def _check_everything_matched(
    model: nn.Module, config: MSPLoraConfig, targets: list[_Target]
) -> None:
    """Refuse every entry of the config that selects nothing, naming the nearest that would."""
    paths = [path for path, _ in _own_modules(model) if path]
    _check_layers(model, config, paths)
    for name in ("target_modules", "exclude_modules"):
        _check_names(name, getattr(config, name, None), paths)
    if config.target_parameters:
        names = [
            f"{path}.{name}"
            for path, module in _own_modules(model)
            for name, _ in _peft.unwrapped(module).named_parameters(recurse=False)
        ]
        _check_names("target_parameters", config.target_parameters, names)
    if not targets:
        raise TargetError(
            f"target_modules = {_shown(config.target_modules)} matches modules, but every one of "
            f"them is left out by exclude_modules = {_shown(config.exclude_modules)}, "
            f"layers_to_transform = {config.layers_to_transform} or modules_to_save = "
            f"{_shown(config.modules_to_save)}. Nothing would be trained."
        )
    for target in targets:
        whole = _trained_whole(config, target.key)
        if whole is not None:
            raise TargetError(
                f"target_modules matches {target.key!r}, which modules_to_save names too, because "
                f"it ends in {whole!r}: it would be trained whole. Leave it out of one of them."
            )
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, name) or {}:
            if not any(_pattern_matches(pattern, target.key) for target in targets):
                raise TargetError(
                    f"{name} has a key {pattern!r} that matches none of the adapted modules."
                    f"{nearest(pattern, {target.key.rpartition('.')[2] for target in targets})}"
                )


def _check_names(field: str, wanted: Any, names: list[str]) -> None:
    if not wanted:
        return
    if isinstance(wanted, str):
        if not any(re.fullmatch(wanted, name) for name in names):
            raise TargetError(
                f"{field} = {wanted!r} is a regular expression that matches none of this model's "
                f"names in full. Names look like {_some(names[-3:])}.{nearest(wanted, names, 1)}"
            )
        return
    for entry in sorted(wanted):
        if not any(name == entry or name.endswith(f".{entry}") for name in names):
            last = {name.rpartition(".")[2] for name in names}
            known = [*sorted(name for name in last if not name.isdigit()), *names]
            raise TargetError(
                f"{field} names {entry!r}, but this model has nothing of that name."
                f"{nearest(entry, known) or f' It has {_some(_leaves(names))}.'}"
            )


def _check_layers(model: nn.Module, config: MSPLoraConfig, paths: list[str]) -> None:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return
    lists: dict[str, set[int]] = {}
    for path in paths:
        stack, block, _ = place(model, path, config.layers_pattern)
        if block is not None:
            lists.setdefault(stack, set()).add(block)
    if config.layers_pattern and not lists:
        stacks = {stack for path in paths if (stack := place(model, path)[0]) != path}
        raise TargetError(
            f"layers_pattern = {config.layers_pattern!r} names no list of blocks of this model. "
            f"Its lists are {_some(sorted(stacks))}."
        )
    known = set().union(*lists.values()) if lists else set()
    missing = sorted({wanted} - known if isinstance(wanted, int) else set(wanted) - known)
    if missing:
        described = ", ".join(
            f"{stack!r} has blocks 0 to {max(blocks)}" for stack, blocks in lists.items()
        )
        raise TargetError(
            f"layers_to_transform asks for {missing}, which no list of blocks has: "
            f"{described or 'this model has no list of blocks'}."
        )


def _inside_attention(model: nn.Module, path: str) -> bool:
    parent = model.get_submodule(path.rpartition(".")[0])
    return isinstance(parent, nn.MultiheadAttention)


def _base_model(model: Any) -> nn.Module:
    """The wrapped base model, under a `PeftModel` or a tuner."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _model_type(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    if isinstance(config, dict):
        return config.get("model_type")
    return getattr(config, "model_type", None)


def _leaf_names(model: nn.Module) -> list[str]:
    return sorted(
        {
            path.rpartition(".")[2]
            for path, module in _own_modules(model)
            if path and isinstance(module, nn.Linear) and not path.rpartition(".")[2].isdigit()
        }
    )


def _leaves(names: list[str]) -> list[str]:
    return sorted({leaf for name in names if not (leaf := name.rpartition(".")[2]).isdigit()})


def _some(names: list[str], count: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:count])
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")


def _shown(value: Any) -> str:
    return str(sorted(value)) if isinstance(value, (set, list, tuple)) else repr(value)
