"""What the model answers: with the adapter, merged, and with the plain LoRA that it is."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from msplora.adapted import name_in_base, other_tensors
from msplora.errors import UnsupportedError
from msplora.finite import is_finite
from msplora.forms import AsPeft, PlainLora
from msplora.merging import merge_layers
from msplora.plain_lora import lora_of
from msplora.probing import logits
from msplora.proving import merged_in_float32, update_error
from msplora.rewritten_base import rewrites_the_base
from msplora.updates import updates_of
from msplora.verifying import VerificationError, compare

from .patient import Patient
from .results import Check, figures, name_of, percent

APPLIED = "changes the output"
MERGED = "merging keeps the output"
CONVERTED = "the converted LoRA is equal"
_ROUNDING = 2
"""Ulps of the largest logit that a logit may move by, where nothing but rounding moves it."""
_EXACT = 1e-5
"""Of an update's norm: what float32 leaves of a LoRA that is the same."""
_REPORT = "Please report this, with the adapter's config."
_MOST = 0.5
"""More than this share of the adapter's effect is much to lose."""
_WITHOUT_ROUNDING = (
    "Load it in float32 (--dtype float32) to see it without that rounding; what it costs, measure "
    "on data of your own."
)


def is_applied(patient: Patient) -> Check:
    """Whether the logits with the adapter are others than without."""
    adapted, plain = patient.adapted, patient.plain
    if patient.why_not_compared:
        return _not_finite(patient)
    largest = float(plain.abs().max())
    other = adapted.argmax(-1) != plain.argmax(-1)
    numbers = figures(
        effect=patient.effect,
        relative=patient.effect / largest if largest else 0.0,
        answers_changed=float(other.float().mean()),
    )
    # An adapter that does nothing adds zeros, and they change no bit.
    if not patient.effect:
        return _without_effect(patient, numbers)
    said = f"The output moves by up to {patient.effect:.3g}, where the largest is {largest:.3g}"
    if patient.effect <= _ROUNDING * torch.finfo(patient.dtype).eps * largest:
        return Check(
            APPLIED,
            "warning",
            f"{said}: what rounding in {name_of(patient.dtype)} alone can make of it.",
            "Look at its norms with msplora inspect: is it large enough to matter?"
            if patient.dtype == torch.float32
            else "Load it in float32 (--dtype float32) to see what it does.",
            numbers,
        )
    if adapted.shape[-1] > 1 and patient.chooses:
        said += (
            f"; the first choice changes in {other.float().mean():.0%} of {other.numel()} places"
        )
    if rewrites_the_base(patient.config):
        said += f". That is beside the base less what {patient.config.init_lora_weights} took of it"
    return Check(APPLIED, "passed", f"{said}.", "", numbers)


def _not_finite(patient: Patient) -> Check:
    """Whether the adapter, the dtype or the base's own file is at fault."""
    said = "The output holds values that are not finite, "
    if bool(patient.plain.isfinite().all()):
        advice = "Load it in float32 (--dtype float32); if it is the same there, training diverged."
        return Check(APPLIED, "failed", f"{said}with the adapter.", advice)
    state = patient.base.named_parameters()
    damaged = next((name for name, its in state if not is_finite(its)), None)
    if damaged is None:
        advice = "Load it in float32 (--dtype float32): it is too large for this dtype."
        return Check(APPLIED, "failed", f"{said}without the adapter, too.", advice)
    said += f"without the adapter, too: so does the base's {name_in_base(damaged)}."
    return Check(APPLIED, "failed", said, "Copy or download the base again.")


def _without_effect(patient: Patient, numbers: Mapping[str, float | None]) -> Check:
    if getattr(patient.config, "alora_invocation_tokens", None):
        return Check(
            APPLIED,
            "skipped",
            "It acts after its invocation tokens only (alora_invocation_tokens), and the inputs do "
            "not hold them.",
            "Give rows that hold them with --data.",
            numbers,
        )
    if not patient.is_reached:
        return Check(
            APPLIED,
            "skipped",
            "The inputs do not reach the weights that it adapts, such as a vision tower's without "
            "an image.",
            "Run it on inputs of your own, through PEFT.",
            numbers,
        )
    said = "With and without it the output is the same, bit by bit."
    advice = "Look at it with msplora inspect: B may be zero. Was it saved before it was trained?"
    if patient.dtype != torch.float32:
        advice += f" Or {name_of(patient.dtype)} hides it: load it in float32 (--dtype float32)."
    return Check(APPLIED, "failed", said, advice, numbers)


def merging_keeps_the_output(patient: Patient) -> Check:
    """Each merged weight against the sum, and the logits against the adapted model's.

    Comes last: it leaves the model merged.
    """
    reason = patient.why_not_merged or patient.why_not_compared
    if reason:
        return Check(MERGED, "skipped", reason)
    expected = patient.adapted, patient.plain
    try:
        merge_layers(patient.model)
    except VerificationError as error:
        said, _, advice = str(error).partition(" Nothing was written. ")  # as nothing would be
        return Check(MERGED, "failed", f"{said[0].upper()}{said[1:]}", advice)
    except UnsupportedError as error:
        return Check(MERGED, "skipped", str(error))
    its = _compared(
        MERGED,
        patient,
        expected,
        logits(patient.model, patient.inputs),
        {patient.dtype},
        "Merge into float32 weights (msplora convert --to merged --dtype float32), or serve the "
        "adapter unmerged.",
    )
    if its.status != "failed":
        return its
    if not patient.is_half:
        return replace(its, advice=_REPORT)
    return its if its.figures["difference"] is None else _without_rounding(patient, its)


def _without_rounding(patient: Patient, found: Check) -> Check:
    """What half precision says is wrong, looked at again with base and adapter cast up."""
    model: Any = patient.model
    half = name_of(patient.dtype)
    model.unmerge_adapter()
    try:
        model.float()
        rows = {
            name: its.float() if its.is_floating_point() else its
            for name, its in patient.inputs.items()
        }
        its = merged_in_float32(model, rows)
    except torch.OutOfMemoryError:
        said = f"{found.said} There is too little memory to tell in float32 whether it is rounding."
        return replace(found, status="warning", said=said, advice=_WITHOUT_ROUNDING)
    numbers = figures(**found.figures, in_float32=its.difference)  # pyright: ignore
    if not its.explained:
        said = (
            f"{found.said} In float32, too, it differs by {its.difference:.2e}: it is no rounding."
        )
        return replace(found, said=said, advice=_REPORT, figures=numbers)
    experts = " and sends tokens to other experts" * patient.has_experts
    said = (
        f"{found.said} In float32 it differs by {its.difference:.2e}: the rest is rounding to "
        f"{half}, which grows from layer to layer{experts}."
    )
    return replace(found, status="warning", said=said, advice=_WITHOUT_ROUNDING, figures=numbers)


def conversion_is_equal(patient: Patient) -> Check:
    """The logits of the plain LoRA that it is; the patient gets its adapter back."""
    if not patient.is_pyramid:
        return Check(CONVERTED, "skipped", "It is a plain LoRA already.")
    if patient.why_not_compared:
        return Check(CONVERTED, "skipped", patient.why_not_compared)
    expected = patient.adapted, patient.plain
    wanted = dict(updates_of(patient.model, variants=True))
    tensors, config = lora_of(patient.model)
    lora = PlainLora(tensors | other_tensors(patient.tensors), config, patient.base.config)
    base: Any = patient.model.unload()
    with tempfile.TemporaryDirectory() as scratch:
        AsPeft(lora).write(Path(scratch))
        converted = PeftModel.from_pretrained(base, scratch).eval()
    found = logits(converted, patient.inputs)
    error = update_error(wanted, dict(updates_of(converted, variants=True)))
    base = converted.unload()
    patient.model = PeftModel.from_pretrained(base, str(patient.folder)).eval()
    if not error <= _EXACT:  # nor a NaN
        said = f"An update of the LoRA differs from the adapter's by {error:.1e} of its size."
        return Check(CONVERTED, "failed", said, _REPORT, figures(update_error=error))
    its = _compared(
        CONVERTED,
        patient,
        expected,
        found,
        {patient.dtype, torch.float32},
        _REPORT,
    )
    # The kernels of a quantised base round in their own way after each loading.
    rough = (patient.is_half or patient.is_quantized) and its.figures["difference"] is not None
    if its.status == "passed" or (its.status == "failed" and not rough):
        return its
    said = f"{its.said} Rounding hides it there; the updates of all weights are equal."
    return Check(CONVERTED, "passed", said, "", its.figures)


def _compared(
    name: str,
    patient: Patient,
    expected: tuple[Tensor, Tensor],
    found: Tensor,
    dtypes: set[torch.dtype],
    advice: str,
) -> Check:
    """Compare with the logits `expected`, with the adapter and without it."""
    adapted, plain = expected
    try:
        its = compare(plain, adapted, found, dtypes)
    except VerificationError:
        difference = float((found - adapted).abs().max())
        numbers = figures(difference=difference, effect=patient.effect)
        said = f"The output differs by up to {difference:.2e}; the adapter's effect is "
        said += f"{patient.effect:.2e}."
        return Check(name, "failed", said, advice, numbers)
    share = its.difference / its.effect if its.effect else 0.0
    numbers = figures(difference=its.difference, effect=its.effect, tolerance=its.tolerance)
    # What is small beside the effect shows that the adapter is there, however little is allowed.
    allowed = f" (allowed {its.tolerance:.0e})" if its.difference <= its.tolerance else ""
    said = f"The output differs by up to {its.difference:.2e}{allowed}, {percent(share)} of the "
    said += "adapter's effect."
    if not share <= _MOST:
        return Check(name, "warning", said, advice, numbers)
    return Check(name, "passed", said, "", numbers)
