"""Combining adapters level by level, for `add_weighted_adapter`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from .config import MSPLoraConfig
from .errors import ConfigError, UnsupportedError
from .layer import PyramidLayer
from .product import stack_a, stack_b
from .pyramid import Plan
from .store import find_store


def combined_adapter(
    model: nn.Module,
    configs: Mapping[str, Any],
    adapters: list[str],
    weights: list[float],
    combination_type: str,
    options: Mapping[str, Any],
) -> tuple[MSPLoraConfig, dict[str, tuple[Tensor, Tensor]]]:
    """The config of the combination, and the (A, B) of each of its pairs, to be used at scale 1."""
    if combination_type not in ("linear", "cat"):
        raise UnsupportedError(
            f"combination_type={combination_type!r} is not supported for MSPLoRA: what it prunes "
            f"or decomposes belongs to one layer, and pairs are shared. Use 'linear' or 'cat'."
        )
    asked = {name: value for name, value in options.items() if value is not None}
    if asked:
        raise UnsupportedError(f"MSPLoRA's add_weighted_adapter does not use {sorted(asked)}.")
    if len(adapters) != len(weights) or not adapters:
        raise ConfigError(f"{len(adapters)} adapters but {len(weights)} weights; give one each.")
    store = find_store(model)
    plans = {} if store is None else store.plans
    for name in adapters:
        if name not in plans:
            raise ConfigError(f"Adapter {name!r} does not exist; there are {sorted(plans)}.")
    assert store is not None
    _check_configs(configs, adapters)
    _check_nothing_trained_whole_twice(model, adapters)
    first = plans[adapters[0]]
    concatenate = combination_type == "cat" and len(adapters) > 1
    for name in adapters[1:]:
        _check_alike(first, plans[name], adapters[0], name, same_ranks=not concatenate)

    set_scales = [_set_scale(model, name) for name in adapters]
    weights = [weight * its for weight, its in zip(weights, set_scales, strict=True)]

    tensors = {}
    with torch.no_grad():
        for place, pair in enumerate(first.pairs):
            pairs = [plans[name].pairs[place] for name in adapters]
            found = [store.pair(pair.address, name) for name in adapters]
            a_factors = [a.factor for a, _ in found]
            b_factors = [b.factor for _, b in found]
            factors = [weight * its.scale for weight, its in zip(weights, pairs, strict=True)]
            if concatenate:
                tensors[pair.address] = (
                    stack_a(a_factors, pair.shape.blocks),
                    stack_b(b_factors, factors),
                )
            else:
                # As PEFT: each factor takes the root of the weight, so the product has the weight.
                roots = [math.sqrt(abs(factor)) for factor in factors]
                signed = [
                    math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)
                ]
                tensors[pair.address] = (_sum(a_factors, roots), _sum(b_factors, signed))

    return _config(configs, plans, adapters, concatenate), tensors


@torch.no_grad()
def take_over_whole(model: nn.Module, adapters: list[str], adapter_name: str) -> None:
    """Give a combination the modules and tokens that one of its adapters has trained whole.

    As they are, whatever the weights: they stand in the place of the base's own and are no change
    of them that could be scaled. PEFT has given the combination those of the base.
    """
    for held in _trained_whole(model):
        source = next((name for name in adapters if name in held), None)
        if source is not None:
            for mine, its in zip(_tensors(held[adapter_name]), _tensors(held[source]), strict=True):
                mine.data = its.detach().clone()


def _trained_whole(model: nn.Module) -> Iterator[Any]:
    """For every module that some adapter trains whole, or tokens of it: adapter -> what it has."""
    for module in model.modules():
        its: Any = module
        if isinstance(module, ModulesToSaveWrapper):
            yield its.modules_to_save
        elif isinstance(module, TrainableTokensWrapper) and not its.token_adapter.tied_adapter:
            yield its.token_adapter.trainable_tokens_delta


def _tensors(held: nn.Module | nn.Parameter) -> list[Tensor]:
    return [held] if isinstance(held, nn.Parameter) else [*held.parameters(), *held.buffers()]


def _set_scale(model: nn.Module, adapter_name: str) -> float:
    """What `set_scale` has made of an adapter, in all layers: their pairs are shared."""
    layers: list[Any] = [its for its in model.modules() if isinstance(its, PyramidLayer)]
    scales: set[float] = {
        layer.scaling[adapter_name] for layer in layers if adapter_name in layer.borrowed
    }
    if len(scales) > 1:
        raise UnsupportedError(
            f"adapter {adapter_name!r} has other scales in other layers ({sorted(scales)}), which "
            f"share pairs: no combination of it has all of them. Call set_scale alike on every "
            f"layer first."
        )
    return scales.pop()


def _config(
    configs: Mapping[str, Any], plans: Mapping[str, Plan], adapters: list[str], concatenate: bool
) -> MSPLoraConfig:
    config = copy.deepcopy(configs[adapters[0]])
    levels = plans[adapters[0]].levels
    ranks = [level.rank for level in levels]
    if concatenate:
        ranks = [
            sum(plans[name].levels[place].rank for name in adapters) for place in range(len(levels))
        ]
    config.ranks = ranks
    config.r = ranks[0]
    config.use_rslora = False
    config.split_alpha = False
    config.alphas = [float(rank) for rank in ranks]  # scale 1: the weights are in B
    config.lora_alpha = config.alphas[0]
    whole = [name for its in adapters for name in configs[its].modules_to_save or ()]
    config.modules_to_save = list(dict.fromkeys(whole)) or None
    config.ensure_weight_tying = any(configs[its].ensure_weight_tying for its in adapters)
    tokens = (configs[its].trainable_token_indices for its in adapters)
    config.trainable_token_indices = copy.deepcopy(next(filter(None, tokens), None))
    return config


def _check_configs(configs: Mapping[str, Any], adapters: list[str]) -> None:
    for name in adapters:
        its = configs[name]
        if its.rank_pattern or its.alpha_pattern or its.use_dora or its.bias != "none":
            raise UnsupportedError(
                f"add_weighted_adapter does not support rank_pattern, alpha_pattern, use_dora or "
                f"bias, and adapter {name!r} has one of them. Leave that adapter out."
            )
    with_tokens = [name for name in adapters if configs[name].trainable_token_indices]
    if len(with_tokens) > 1:
        raise ConfigError(
            f"adapters {with_tokens} each have trainable_token_indices, and a token has one row: "
            f"whose the combination has would be left open. Combine adapters of which at most one "
            f"trains tokens."
        )


def _check_nothing_trained_whole_twice(model: nn.Module, adapters: list[str]) -> None:
    wrappers: list[Any] = [its for its in model.modules() if isinstance(its, ModulesToSaveWrapper)]
    twice = [its for its in wrappers if sum(name in its.modules_to_save for name in adapters) > 1]
    if twice:
        raise ConfigError(
            f"Cannot add weighted adapters if they target the same module with modules_to_save, "
            f"but found {len(twice)} such instance(s). Combine adapters of which at most one "
            f"trains a module whole."
        )


def _check_alike(
    first: Plan, other: Plan, first_name: str, other_name: str, same_ranks: bool
) -> None:
    ours = [(pair.address, pair.sites) for pair in first.pairs]
    theirs = [(pair.address, pair.sites) for pair in other.pairs]
    if ours != theirs:
        raise ConfigError(
            f"adapters {first_name!r} and {other_name!r} do not share alike: they must have the "
            f"same sites, levels and groups to be combined pair by pair."
        )
    if same_ranks and [p.rank for p in first.pairs] != [p.rank for p in other.pairs]:
        raise ConfigError(
            f"adapters {first_name!r} and {other_name!r} have different ranks, which 'linear' "
            f"cannot add. Use combination_type='cat'."
        )


def _sum(tensors: Sequence[Tensor], factors: list[float]) -> Tensor:
    total = torch.zeros_like(tensors[0])
    for tensor, factor in zip(tensors, factors, strict=True):
        total += tensor * factor
    return total
