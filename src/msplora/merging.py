"""Merging layer by layer, each weight held against what it has to become, and what rounding takes.

    W' = round(W + Δ)

In half precision most of a small Δ falls below the last digit of W. No merge can keep that; that
nothing else is lost, and how much it is, can be said.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from . import _peft
from .adapted import embeddings_of
from .errors import MSPLoraError, UnsupportedError
from .spectrum import norm_of, site_factors
from .verifying import VerificationError

_ADVICE = "Nothing was written. Please report this, with the adapter's config."


@dataclass(frozen=True)
class Rounding:
    """What rounding took of all updates together."""

    error: float
    """The norm of what is missing or too much, over that of the updates."""
    lost: float
    """The share of the updates, by squares, that lies in numbers that did not change."""


@torch.no_grad()
def merge_layers(model: Any, adapter_name: str = "default") -> Rounding | None:
    """Merge an adapter into its layers' weights, one after the other, and look at each.

    Returns:
        `None` where the weights cannot be looked at, because they are quantised.

    Raises:
        VerificationError: a weight did not become the sum, rounded; or it is not finite.
        UnsupportedError: PEFT, or the adapter's method, cannot merge such a layer; or its weight is
            another layer's too.
    """
    root = model.get_base_model()
    quantised = bool(getattr(root, "is_quantized", False))
    norms = {} if quantised else _norms(model, adapter_name)
    _untie(root)
    if not quantised:
        _check_apart(root, adapter_name)
    missed = lost = total = 0.0
    for path, module in list(root.named_modules()):
        layer: Any = module
        if not isinstance(module, LoraLayer) or adapter_name not in layer.scaling or layer.merged:
            continue
        if quantised or getattr(layer, "merged_by_another", False):
            _merge(layer, path)
            continue
        before = _weight(layer).detach().to(_at_least_float32(_weight(layer)), copy=True)
        wanted = _merged(layer, adapter_name, before)
        update = wanted - before
        _check_size(update, norms.get(_key(layer, path)), path)
        _merge(layer, path)
        after = _weight(layer).detach()
        _check_sum(before, wanted, after, path)
        changed = after.to(before) - before
        missed += _squares(changed - update)
        lost += _squares(update[changed == 0])
        total += _squares(update)
    if quantised:
        return None
    return Rounding((missed / total) ** 0.5, lost / total) if total else Rounding(0.0, 0.0)


def _untie(root: Any) -> None:
    """Give an adapted embedding, or head, a weight of its own where the other one has the same.

    What is merged into one would else change the other. A pyramid on both, which means that, is
    merged once, and stays tied.
    """
    both = [module for _, module in embeddings_of(root)]
    if len(both) < 2 or any(getattr(its, "merged_by_another", False) for its in both):
        return
    bare: list[Any] = [_peft.unwrapped(its) for its in both]
    adapted = any(isinstance(its, LoraLayer) for its in both)
    if not adapted or bare[0] is bare[1] or bare[0].weight is not bare[1].weight:
        return
    bare[1].weight = nn.Parameter(bare[1].weight.detach().clone(), requires_grad=False)
    if not _is_shared(bare[0].weight, root):
        _say_untied(root)


def _say_untied(root: Any) -> None:
    """Let the config say that the embedding and the head have weights of their own."""
    for config in (root.config.get_text_config(decoder=True), root.config):
        config.tie_word_embeddings = False


def _check_apart(root: nn.Module, adapter_name: str) -> None:
    """Refuse a weight that is also another layer's, which would change with it.

    Such are the embeddings of an encoder and a decoder, or the blocks of `layer_replication`: each
    sum would be right, and the model wrong. Layers that one pair is merged into once, for all of
    them, may share.
    """
    places: Counter[int] = Counter()
    times: Counter[Any] = Counter()
    for _, module in root.named_modules(remove_duplicate=False):
        times[module] += 1
        places.update(_storage(its) for its in module._parameters.values() if its is not None)
    layers: list[tuple[str, Any]] = []
    for path, module in root.named_modules():
        layer: Any = module
        if not isinstance(module, LoraLayer) or adapter_name not in layer.scaling:
            continue
        if getattr(layer, "merged_by_another", False):
            places[_storage(_weight(layer))] -= times[module]
        else:
            layers.append((path, layer))
    for path, layer in layers:
        if places[_storage(_weight(layer))] > times[layer]:
            raise UnsupportedError(
                f"{path!r} cannot be merged: its weight is also that of another layer, which would "
                f"change with it. Use the adapter unmerged."
            )


def _storage(weight: Tensor) -> int:
    """What weights have in common that are one; those that lie nowhere have only themselves."""
    return weight.data_ptr() or id(weight)


def _is_shared(weight: Any, root: nn.Module) -> bool:
    """Whether a weight is in more than one place of a model."""
    wrappers = (_peft.BaseTunerLayer, _peft.AuxiliaryTrainingWrapper)
    places = [
        path
        for path, module in root.named_modules(remove_duplicate=False)
        if not isinstance(module, wrappers) and module._parameters.get("weight") is weight
    ]
    return len(places) > 1


def _merge(layer: Any, path: str) -> None:
    try:
        layer.merge(safe_merge=True)
    except NotImplementedError as error:
        raise UnsupportedError(f"PEFT cannot merge {path!r}: {error}") from error
    except MSPLoraError:  # a `ValueError` too, and says itself why
        raise
    except ValueError as error:  # what PEFT raises of numbers that are not finite
        raise VerificationError(
            f"the merged weight of {path!r} is not finite: the sum is beyond its dtype. Nothing "
            f"was written. Merge into float32 (--dtype float32)."
        ) from error


def _weight(layer: Any) -> Tensor:
    base = layer.get_base_layer()
    if hasattr(layer, "parameter_name"):
        return layer.get_param()
    return base.in_proj_weight if isinstance(base, nn.MultiheadAttention) else base.weight


def _merged(layer: Any, adapter_name: str, before: Tensor) -> Tensor:
    """The sum of weight and update, before it is rounded."""
    if adapter_name in layer.lora_variant:  # DoRA scales it
        variant = layer.lora_variant[adapter_name]
        try:
            return variant.merge_safe(layer, adapter_name, before.clone()).to(before)
        except NotImplementedError as error:
            raise UnsupportedError(f"PEFT cannot merge such an adapter: {error}") from error
    return before + layer.get_delta_weight(adapter_name).to(before).reshape(before.shape)


def _at_least_float32(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _check_sum(before: Tensor, wanted: Tensor, after: Tensor, path: str) -> None:
    """Each number is the sum, but for the rounding of the update and that of the sum."""
    kind = torch.finfo(after.dtype)
    half_ulps = (wanted.abs() + (wanted - before).abs()) * (kind.eps / 2)
    allowed = 1.5 * half_ulps + kind.tiny * kind.eps
    if not bool(((after.to(wanted) - wanted).abs() <= allowed).all()):
        raise VerificationError(
            f"the merged weight of {path!r} is not the sum of weight and update. {_ADVICE}"
        )


def _check_size(update: Tensor, norm: float | None, path: str) -> None:
    """The update that is added has the norm of the factors that act in the adapted layer."""
    if norm is not None and not abs(_squares(update) ** 0.5 - norm) <= 1e-2 * norm:
        raise VerificationError(
            f"what is merged into {path!r} is not what its factors say. {_ADVICE}"
        )


def _norms(model: Any, adapter_name: str) -> dict[str, float]:
    try:
        return {key: norm_of(a, b) for key, a, b in site_factors(model, adapter_name)}
    except UnsupportedError:  # DoRA, whose update is more than its factors
        return {}


def _key(layer: Any, path: str) -> str:
    key = ".".join(part for part in path.split(".") if part != "base_layer")
    return f"{key}.{layer.parameter_name}" if hasattr(layer, "parameter_name") else key


def _squares(numbers: Tensor) -> float:
    return float(numbers.square().sum(dtype=torch.float64))


def unloaded(model: Any) -> Any:
    """The model of merged layers, without them.

    A head or an embedding that was trained whole is no longer the weight of the other one. The
    config has to say so: of a model of several parts in the text's too, which PEFT forgets; but
    not where an encoder and a decoder still have one embedding, since it speaks of all of them.
    """
    config = model.get_base_model().config
    said = getattr(config, "tie_word_embeddings", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        merged = model.merge_and_unload(safe_merge=True)
    weights = [its.weight for _, its in embeddings_of(merged) if hasattr(its, "weight")]
    if len(weights) == 2 and weights[0] is not weights[1]:
        if not any(_is_shared(its, merged) for its in weights):
            _say_untied(merged)
        elif said is not None:
            config.tie_word_embeddings = said
    return merged
