"""From a model and a config to the plan."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import _peft
from .blocks import place
from .config import MSPLoraConfig
from .errors import ConfigError, TargetError
from .matching import (
    Target,
    check_everything_matched,
    find_targets,
    input_embedding,
    inside_attention,
    linear_names,
    model_type_of,
    own_modules,
    pattern_matches,
    some,
    trained_whole,
)
from .parameters import experts_named_as_modules
from .pyramid import Level, Plan, Site, arrange


def plan(model: Any, config: MSPLoraConfig, *, trust_remote_code: bool = False) -> Plan:
    """Say what `config` would adapt and share in `model`, without touching either.

    Args:
        model: a `torch.nn.Module`, on any device (the meta device included), with or without
            adapters; or a transformers `PretrainedConfig`, of which the model is then built on the
            meta device, so that no weight is allocated.
        config: the pyramid asked for.
        trust_remote_code: run the Python code that a transformers config brings for its model.

    Returns:
        The frozen plan: print it, or read its `sites`, `pairs`, `parameters`, `lora_parameters`.

    Raises:
        TargetError: a target, layer index or pattern that matches nothing, or that cannot be
            adapted; or a transformers config of which no model can be built.
    """
    if not isinstance(config, MSPLoraConfig):
        raise ConfigError(f"plan needs an MSPLoraConfig, not a {type(config).__name__}.")
    if not isinstance(model, nn.Module):
        if not hasattr(model, "model_type"):
            raise TargetError(
                f"plan needs a model, or a transformers config such as "
                f"AutoConfig.from_pretrained(...) gives; this is a {type(model).__name__}."
            )
        model = on_meta(model, trust_remote_code)
    model = _base_model(model)
    return make_plan(model, prepared(model, config))


def on_meta(model_config: Any, trust_remote_code: bool = False) -> nn.Module:
    """Build the model of a transformers config on the meta device: shapes without storage.

    Raises:
        TargetError: the config brings code for its model, which is not to be trusted.
    """
    import transformers

    name = (getattr(model_config, "architectures", None) or [""])[0]
    # The automatic class that loads the model -> "file.Class".
    brought = {
        auto: str(its)
        for auto, its in (getattr(model_config, "auto_map", None) or {}).items()
        if auto.startswith("AutoModel") and hasattr(transformers, auto)
    }
    found = getattr(transformers, name, None) if name else None
    if brought and trust_remote_code:
        named = [auto for auto, its in brought.items() if its.rpartition(".")[2] == name]
        found = getattr(transformers, [*named, *brought][0])
    try:
        model = without_storage(found or transformers.AutoModel, model_config, trust_remote_code)
    except ValueError as error:
        if not brought or trust_remote_code:
            raise
        raise TargetError(
            f"transformers knows no model of type {model_config.model_type!r}; its config names "
            f"code of its own ({', '.join(sorted(set(brought.values())))}). Opt in with "
            f"trust_remote_code if you trust it, or plan on the model itself."
        ) from error
    model.tie_weights()
    return model


def without_storage(found: Any, model_config: Any, trust_remote_code: bool) -> Any:
    """A model of the class `found`, which may be one of transformers' automatic ones, on meta."""
    with torch.device("meta"):
        if hasattr(found, "from_config"):  # the automatic classes are not made
            return found.from_config(model_config, trust_remote_code=trust_remote_code)
        return found(model_config)


def prepared(model: nn.Module, config: MSPLoraConfig) -> MSPLoraConfig:
    """A copy of `config` whose `target_modules` are spelled out as PEFT would."""
    config = copy.copy(config)
    if config.target_modules is None and config.target_parameters:
        # Parameters alone; PEFT would add its default modules of this type of model.
        config.target_modules = set()
    if config.target_modules is None:
        model_type = model_type_of(model)
        default = _peft.DEFAULT_TARGETS.get(model_type or "")
        if default is None:
            raise TargetError(
                f"Please specify `target_modules`: PEFT has no default for "
                f"{model_type or type(model).__name__!r}. Name some of this model's modules: "
                f"{some(linear_names(dict(own_modules(model))))}; or use 'all-linear'."
            )
        config.target_modules = default if isinstance(default, str) else set(default)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        _peft.include_all_linear(config, model)
        # PEFT counts the first as linear layers, but their attention reads the weight directly, so
        # an adapter on them would never act; the second it means to train whole.
        config.target_modules = {
            key
            for key in config.target_modules
            if not inside_attention(model, key) and trained_whole(config, key) is None
        }
    _name_what_is_tied(model, config)
    return config


def make_plan(model: nn.Module, config: MSPLoraConfig) -> Plan:
    """The plan of a prepared config."""
    modules = dict(own_modules(model))
    targets = find_targets(modules, config)
    check_everything_matched(modules, config, targets)
    tied = _tied_sites(modules, config, targets)
    sites = [_site(model, config, target) for target in targets if target.key not in tied]
    return arrange(
        sites,
        config.pyramid,
        levels_of=_levels_of(config, sites),
        own_rank=[
            its.key for its in sites if _pattern_value(config.rank_pattern, its.key) is not None
        ],
        use_dora=config.use_dora,
        tied=tied,
        notes=[*_notes(sites, tied), *_unadapted_experts(modules, config), *_not_counted(config)],
    )


def _site(model: nn.Module, config: MSPLoraConfig, target: Target) -> Site:
    stack, block, kind = place(model, target.key, config.layers_pattern)
    return Site(target.key, stack, kind, block, target.shape)


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
        if pattern_matches(pattern, key):
            return value
    return None


def _tied_sites(
    modules: Mapping[str, nn.Module], config: MSPLoraConfig, targets: list[Target]
) -> dict[str, str]:
    """Key of a tied head -> key of the embedding whose pairs it borrows (`ensure_weight_tying`)."""
    embedding = input_embedding(modules[""])
    if embedding is None:
        return {}
    name, weight = embedding
    heads = _tied_heads(modules, name, weight)
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
    if getattr(getattr(modules[""], "config", None), "tie_word_embeddings", None) is False:
        raise TargetError(
            f"{[name, *heads]} are one weight, but the model's config says tie_word_embeddings="
            f"False, by which PEFT goes: it would adapt them apart, and merging one would change "
            f"the others. Set model.config.tie_word_embeddings=True, or give each its own weight."
        )
    if name not in targeted:
        raise TargetError(
            f"target_modules matches {sorted(targeted & set(heads))}, tied to {name!r}, which is "
            f"left out by exclude_modules, layers_to_transform or modules_to_save. The embedding "
            f"owns the pairs: adapt it, or leave out the others too."
        )
    if config.use_dora:
        raise TargetError(
            f"use_dora does not work on {[name, *heads]}, which share one weight: each would "
            f"normalise it along another axis. Leave them out, or set use_dora=False."
        )
    return dict.fromkeys(heads, name)


def _tied_heads(modules: Mapping[str, nn.Module], name: str, weight: torch.Tensor) -> list[str]:
    """What uses the weight of the embedding `name` too."""
    return [
        path
        for path, module in modules.items()
        if path != name
        and isinstance(base := _peft.unwrapped(module), (nn.Linear, nn.Embedding))
        and base.weight is weight
    ]


def _name_what_is_tied(model: nn.Module, config: MSPLoraConfig) -> None:
    """Let who names one of the layers that share the embedding's weight mean all, in place.

    PEFT does, but 0.18 adapts what is named only.
    """
    embedding = input_embedding(model)
    if not config.ensure_weight_tying or not config.target_modules or embedding is None:
        return
    name, weight = embedding
    tied = [name, *_tied_heads(dict(own_modules(model)), name, weight)]
    missing = [key for key in tied if not _peft.is_target(config, key)]
    if len(missing) == len(tied):
        return
    if isinstance(config.target_modules, str):
        wanted = [f"({config.target_modules})", *map(re.escape, missing)]
        config.target_modules = "|".join(wanted)
    else:
        config.target_modules = {*config.target_modules, *missing}


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


def _unadapted_experts(modules: Mapping[str, nn.Module], config: MSPLoraConfig) -> list[str]:
    """What a regular expression that was written for another release of transformers may mean."""
    pattern = config.target_modules
    if not isinstance(pattern, str):
        return []
    found = experts_named_as_modules(modules, pattern)
    found = [
        its for its in found if not any(its.endswith(t) for t in config.target_parameters or ())
    ]
    if not found:
        return []
    return [
        f"target_modules = {pattern!r} matches {some(found, 3)} too: parameters, no modules, and "
        f"not adapted. Name them in target_parameters to adapt them."
    ]


def _not_counted(config: MSPLoraConfig) -> list[str]:
    """What trains beside the pairs, which alone the plan counts."""
    its = {
        "modules_to_save": config.modules_to_save,
        "bias": config.bias if config.bias != "none" else None,
        "trainable_token_indices": getattr(config, "trainable_token_indices", None),
    }
    named = [f"{name} = {value!r}" for name, value in its.items() if value]
    return [f"Trained too, and not counted here: {', '.join(named)}."] if named else []


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


def _base_model(model: Any) -> nn.Module:
    """The wrapped base model, under a `PeftModel` or a tuner."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
