"""What rounding does to weights: merging and unmerging, and merged weights in half precision.

One layer at a time: besides the model, one layer's weight and its update are held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .patient import Patient
from .restored import adapted_layers
from .results import Check, figures, name_of, percent

UNMERGED = "unmerging restores the base"
_HALVES = (torch.bfloat16, torch.float16)
_RESTORED = 8
"""Ulps of the weights' norm by which unmerged weights may differ."""
_ERROR, _LOST = 0.1, 0.5
"""A rounding error above this share of the update is worth a warning; and this share of it lost in
the base's own dtype is a failure."""


def magnitude(tensor: Tensor) -> float:
    """The largest magnitude in a tensor; infinite if any number is not finite."""
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    return largest if math.isfinite(largest) else math.inf


def rounded(dtype: torch.dtype) -> str:
    """The name of the check of merged weights."""
    return f"merged weights in {name_of(dtype)}"


def unmerging_restores_the_base(patient: Patient) -> Check:
    """Each layer merged and unmerged, against what it was."""
    if patient.why_not_merged:
        return Check(UNMERGED, "skipped", patient.why_not_merged)
    found = patient.restored
    error, exact, count = found.error, found.exact, found.parameters
    allowed = _RESTORED * torch.finfo(patient.dtype).eps
    numbers = figures(error=error, exact=exact, parameters=count)
    if exact == count:
        return Check(UNMERGED, "passed", f"All {count} weights come back bit by bit.", "", numbers)
    said = (
        f"{exact} of {count} weights come back bit by bit; the rest to {error:.1e} of their norm."
    )
    advice = "Keep a copy of the base, or use disable_adapter() in place of merging back and forth."
    if not error <= allowed:  # nor a NaN
        return Check(UNMERGED, "failed", said, advice, numbers)
    return Check(UNMERGED, "passed", said, "", numbers)


@dataclass
class _Rounding:
    """Sums over all updates, of one dtype."""

    error: float = 0.0
    lost: float = 0.0
    largest: float = 0.0


@torch.no_grad()
def rounding_keeps_the_update(patient: Patient) -> list[Check]:
    """How much of the update is left when merged weights are stored in half precision."""
    reason = patient.why_not_merged
    if patient.config.use_dora:
        reason = "It uses DoRA: merging rescales the weights, so there is no update to compare."
    if reason:
        return [Check(rounded(dtype), "skipped", reason) for dtype in _HALVES]
    sums = {dtype: _Rounding() for dtype in _HALVES}
    total = 0.0
    for weight, delta in _updates(patient):
        weight, delta = weight.float(), delta.float()
        total += float(delta.double().square().sum())
        for dtype, its in sums.items():
            kept = (weight + delta).to(dtype).float() - weight.to(dtype).float()
            its.error += float((kept - delta).double().square().sum())
            its.lost += float(delta[kept == 0].double().square().sum())
            its.largest = max(its.largest, magnitude(weight + delta))
    if not total:
        return [Check(rounded(dtype), "skipped", "The update is zero.") for dtype in _HALVES]
    return [_rounding(patient, dtype, its, total) for dtype, its in sums.items()]


def _rounding(patient: Patient, dtype: torch.dtype, its: _Rounding, total: float) -> Check:
    largest = torch.finfo(dtype).max
    error, lost = (its.error / total) ** 0.5, its.lost / total
    numbers = figures(error=error, lost=lost, largest=its.largest)
    advice = (
        "Serve the adapter unmerged, or keep the merged weights in float32 (msplora convert --to "
        "merged --dtype float32)."
    )
    if its.largest > largest:
        said = f"The largest merged weight is {its.largest:.3g}, and {name_of(dtype)} ends at "
        return Check(rounded(dtype), "warning", f"{said}{largest:.3g}.", advice, numbers)
    said = (
        f"{percent(lost)} of the update is lost (weights that do not change at all); rounding adds "
        f"an error of {percent(error)} of its norm."
    )
    if not lost <= _LOST and dtype == patient.dtype:
        return Check(rounded(dtype), "failed", said, advice, numbers)
    if not error <= _ERROR:  # nor a NaN
        return Check(rounded(dtype), "warning", said, advice, numbers)
    return Check(rounded(dtype), "passed", said, "", numbers)


def _updates(patient: Patient) -> Iterator[tuple[Tensor, Tensor]]:
    """Each adapted weight and what is added to it, in the weight's own shape."""
    for _, layer in adapted_layers(patient.base):
        base = layer.get_base_layer()
        if isinstance(base, nn.MultiheadAttention):
            continue  # of which the in_proj is fused; its out_proj is a layer of its own
        # An embedding that a head is tied to merges for both.
        if getattr(layer, "merged_by_another", False):
            continue
        weight = layer.get_param() if hasattr(layer, "parameter_name") else base.weight
        yield weight.detach(), layer.get_delta_weight("default").reshape(weight.shape)
