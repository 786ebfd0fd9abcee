"""What half precision does to the factors and to what flows through the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from msplora.inspection.adapter import matrices_of
from msplora.inspection.entries import entries_of
from msplora.inspection.tensor_file import TensorFiles
from msplora.loading import WEIGHTS_FILE
from msplora.probing import logits
from msplora.spectrum import norm_of

from .patient import Patient
from .results import Check, figures, name_of, percent
from .weights import magnitude

FACTORS = "factors in {}"
ACTIVATIONS = "activations in float16"
_ERROR = 0.02
"""Of the update, by rounding its factors: bfloat16's own 8 bits give about 0.003."""


def factors_survive(patient: Patient) -> list[Check]:
    """The update of factors rounded to half precision, through the factors alone."""
    return [_factors(patient, dtype) for dtype in (torch.bfloat16, torch.float16)]


def _factors(patient: Patient, dtype: torch.dtype) -> Check:
    files = TensorFiles([patient.folder / WEIGHTS_FILE])
    errors, total, largest = 0.0, 0.0, 0.0
    for entry in entries_of(files, patient.config).pairs:
        a, b = files.read(entry.a).double(), files.read(entry.b).double()
        largest = max(largest, magnitude(a), magnitude(b))
        if largest > torch.finfo(dtype).max:
            continue
        exact, found = matrices_of(a, b, entry), matrices_of(a.to(dtype), b.to(dtype), entry)
        if exact is None or found is None:
            continue  # which is said where the file is looked at
        (a_RI, b_OR), (a_found, b_found) = exact, found
        both_a = torch.cat([a_RI.double(), a_found.double()], dim=-2)
        both_b = torch.cat([b_OR.double(), -b_found.double()], dim=-1)
        square = entry.level.scale**2
        errors += square * norm_of(both_a, both_b) ** 2
        total += square * norm_of(a_RI, b_OR) ** 2
    name = FACTORS.format(name_of(dtype))
    if largest > torch.finfo(dtype).max:
        return Check(
            name,
            "failed" if patient.dtype == dtype else "warning",
            f"The largest number in the factors is {largest:.3g}, and {name_of(dtype)} ends at "
            f"{torch.finfo(dtype).max:.3g}.",
            "Keep the adapter in float32 or bfloat16.",
            figures(largest=largest),
        )
    error = math.sqrt(errors / total) if total else 0.0
    numbers = figures(error=error, largest=largest)
    said = f"Rounding the factors changes the update by {percent(error)} of its norm."
    if not error <= _ERROR:  # nor a NaN
        return Check(name, "warning", said, "Keep the adapter in float32.", numbers)
    return Check(name, "passed", said, "", numbers)


def activations_stay_in_range(patient: Patient) -> Check:
    """The largest number that any module puts out, against float16's end."""
    with _largest(patient.base) as adapted:
        logits(patient.model, patient.inputs)
    with _largest(patient.base) as plain, patient.without_adapter():
        logits(patient.model, patient.inputs)
    where = max(adapted, key=adapted.__getitem__)
    largest, before = adapted[where], max(plain.values())
    end = torch.finfo(torch.float16).max
    numbers = figures(largest=largest, without=before, end=end)
    if largest <= end:
        said = f"The largest is {largest:.3g} ({where}), {largest / end:.2%} of what float16 holds"
        return Check(
            ACTIVATIONS, "passed", f"{said}; without the adapter {before:.3g}.", "", numbers
        )
    blame = "without the adapter, too" if before > end else "the adapter's doing"
    return Check(
        ACTIVATIONS,
        "failed" if patient.dtype == torch.float16 else "warning",
        f"The largest is {largest:.3g} ({where}), and float16 ends at {end:.0f}: {blame}.",
        "Run it in bfloat16 or float32.",
        numbers,
    )


@contextmanager
def _largest(model: nn.Module) -> Iterator[dict[str, float]]:
    """Module → the largest magnitude in its output; infinite where it is not finite."""
    found: dict[str, float] = {"the model": 0.0}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # What flows on comes first; a mask may come after, whose numbers are huge on purpose.
            if isinstance(output, (tuple, Mapping)):
                output = next(iter(output.values() if isinstance(output, Mapping) else output))
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                found[name] = max(found.get(name, 0.0), magnitude(output))

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if name and not isinstance(module, nn.ModuleList)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
