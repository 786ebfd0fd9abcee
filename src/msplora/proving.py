"""The proof of a conversion: of what PEFT loads of the files, before they are put in place.

A plain LoRA is exact, so its updates are compared with the adapter's weight by weight, through the
factors, whatever the base's dtype; and the logits say that the real model applies them. Where the
base's rounding moves the logits more than the adapter does, they are compared in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from .adapted import Adapted
from .merging import Rounding, merge_layers
from .probing import Probe, logits
from .updates import Blocks, norm_of, updates_of
from .verifying import Comparison, VerificationError, check

# By the dtype that the factors were written in, how much of an update it may cost.
_ROUNDED = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
_HALF = (torch.float16, torch.bfloat16)
_REPORT = "Nothing was written. Please report this, with the adapter's config."


def prove_lora(
    adapted: Adapted,
    load: Callable[[Any], PeftModel],
    dtype: torch.dtype,
    again: Callable[[], Adapted],
) -> Comparison:
    """Hold the LoRA that was written against the adapter it was made of.

    Args:
        adapted: the adapter on its base, which is taken apart.
        load: what was written, put on a base by PEFT.
        dtype: of the factors written.
        again: the adapter on its base once more, in float32.

    Raises:
        VerificationError: they are not the same.
    """
    # Only factors and logits are held beside the model: never two models at once.
    wanted, magnitudes = dict(updates_of(adapted.model, variants=True)), _magnitudes(adapted.model)
    others = adapted.others
    probe = Probe(adapted.model)
    converted = load(adapted.take_base())
    found = dict(updates_of(converted, variants=True))
    error = max(update_error(wanted, found), _apart(magnitudes, _magnitudes(converted)))
    if not error <= _ROUNDED[dtype]:  # nor a NaN
        advice = _REPORT if dtype == torch.float32 else "Nothing was written. Use --dtype float32."
        raise VerificationError(
            f"the LoRA that was written is not the adapter: an update is off by {error:.1e} of its "
            f"size. {advice}"
        )
    _check_held(others, converted)
    its = probe.compared(converted, dtype)
    if not its.shown and can_be_float32(converted):
        del converted
        its = compared_in_float32(again, load, dtype)
    if dtype in _HALF:
        # The rounding that was asked for, which the updates have been held to; through the layers
        # it grows, most where an adapter is large.
        its = replace(its, tolerance=max(its.tolerance, its.effect))
    return check(replace(its, update_error=error))


def can_be_float32(model: PeftModel) -> bool:
    """Whether a model's base is in half precision, and loads in float32 too."""
    root: Any = model.get_base_model()
    return root.dtype in _HALF and not getattr(root, "is_quantized", False)


def compared_in_float32(
    again: Callable[[], Adapted], load: Callable[[Any], PeftModel], dtype: torch.dtype
) -> Comparison:
    """Compare logits that the base's rounding does not move, as a router does that it flips.

    Args:
        again: the adapter on its base, in float32.
        load: what was written, put on a base by PEFT.
        dtype: of the factors written.
    """
    adapted = again()
    probe = Probe(adapted.model)
    return probe.compared(load(adapted.take_base()), dtype)


def merged_in_float32(model: PeftModel, inputs: dict[str, Tensor] | None = None) -> Comparison:
    """Merge a model that was loaded in float32, and compare: little of it is rounding there.

    Args:
        model: the adapted one; it is left merged.
        inputs: to compare on, where not on random ones.
    """
    probe = Probe(model, inputs)
    merge_layers(model)
    return probe.compared(model)


def prove_merged(
    probe: Probe,
    rounding: Rounding | None,
    merged: Tensor,
    reloaded: nn.Module,
    again: Callable[[], PeftModel],
) -> Comparison:
    """Hold a merged model, loaded from its files, against the adapted model.

    Args:
        probe: of the adapted model.
        rounding: of its weights, if they were looked at: what rounding does to the logits is then
            no error.
        merged: the logits of the merged model before it was saved.
        reloaded: as it was loaded again.
        again: the adapter on its base once more, in float32.

    Raises:
        VerificationError: they are not the same.
    """
    its = probe.compared(reloaded)
    between = float((logits(reloaded, probe.inputs) - merged).abs().max())
    ulps = 4 * torch.finfo(probe.dtype).eps * max(1.0, float(merged.abs().max()))
    if not between <= max(ulps, 0.05 * its.effect):
        raise VerificationError(
            f"the merged model answers otherwise once it is saved and loaded: its logits differ by "
            f"up to {between:.2e}. {_REPORT}"
        )
    if rounding is not None:
        its = replace(its, update_error=rounding.error, update_lost=rounding.lost)
        if probe.dtype in _HALF:
            if not its.explained:  # by bfloat16's own rounding: routers flip, or it is wrong
                del reloaded
                check(merged_in_float32(again()))
            return its
    return check(its)


def update_error(wanted: Mapping[str, Blocks], found: Mapping[str, Blocks]) -> float:
    """The worst update's distance, over its norm; infinite for one that is missing or too many."""
    errors = [0.0]
    for key in wanted.keys() | found.keys():
        its, other = wanted.get(key), found.get(key)
        if its is None or other is None:
            errors.append(float("inf") if norm_of(its or other or []) else 0.0)
        elif not _same(its, other):
            rest = [
                (torch.cat([a, a_other]), torch.cat([b, -b_other], 1))
                for (a, b), (a_other, b_other) in zip(its, other, strict=True)
            ]
            size, distance = norm_of(its), norm_of(rest)
            errors.append(distance / size if size else float("inf") if distance else 0.0)
    return max(errors)


def _same(one: Blocks, other: Blocks) -> bool:
    return len(one) == len(other) and all(
        torch.equal(*pair)
        for blocks in zip(one, other, strict=True)
        for pair in zip(*blocks, strict=True)
    )


def _magnitudes(model: Any) -> dict[str, Tensor]:
    """DoRA's, of every layer."""
    return {
        path: its.weight.detach().cpu().double()
        for path, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
        for layer in [module]
        for its in getattr(layer, "lora_magnitude_vector", {}).values()  # pyright: ignore
    }


def _apart(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    if wanted.keys() != found.keys():
        return float("inf")
    return max(
        [float((its - found[key]).norm() / its.norm()) for key, its in wanted.items()], default=0.0
    )


def _check_held(others: Mapping[str, Tensor], converted: PeftModel) -> None:
    """What belongs to no pair is in the model too: a head, biases, trained tokens."""
    if not others:
        return
    held: dict[str, Any] = get_peft_model_state_dict(converted, save_embedding_layers=False)
    whole = converted.state_dict()
    for key, its in others.items():
        found = held.get(key, whole.get(key))
        if found is None or found.shape != its.shape or not torch.equal(found.cpu(), its.to(found)):
            raise VerificationError(f"{key!r} is not in the model as it was written. {_REPORT}")
