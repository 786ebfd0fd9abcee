"""Comparing what two models answer, a converted one and the adapted one it was made from.

Rounding moves logits too, in half precision by more than a small adapter does. So a difference is
held against the adapter's own effect: where it is small beside that, the logits prove something.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import MSPLoraError

# What rounding explains, by the coarsest dtype on the way; of the largest logit if that is above 1.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_SMALL = 0.05
"""A difference of no more than this share of the adapter's effect shows that it is there whole."""


_MUCH = 0.5
"""A merge that is off by more than this share of the updates' norm has lost much of the adapter."""


class VerificationError(MSPLoraError):
    """A converted model does not answer as the adapted one does."""


@dataclass(frozen=True)
class Comparison:
    """How far a converted model is from the adapted model."""

    difference: float
    """The largest absolute difference of their logits."""
    effect: float
    """The largest absolute change of the logits by the adapter itself, for scale."""
    tolerance: float
    """What rounding explains."""
    dtype: str = "float32"
    """What the logits were computed in."""
    update_error: float | None = None
    """How far the updates of the weights are from the adapter's, in Frobenius norms: of a LoRA the
    worst weight's; of merged weights, all of them together."""
    update_lost: float | None = None
    """Of merged weights: the share of the updates, by squares, in numbers that did not change."""

    @property
    def explained(self) -> bool:
        """Whether rounding explains the difference, or it is small beside what the adapter does."""
        return self.difference <= self.tolerance or self.shown

    @property
    def shown(self) -> bool:
        """Whether the difference is small beside what the adapter does."""
        return self.effect > 0 and self.difference <= _SMALL * self.effect

    @property
    def rounded_away(self) -> str | None:
        """What to tell users of a merge that keeps little of the adapter."""
        if self.update_error is None or self.update_lost is None or self.update_error <= _MUCH:
            return None
        return (
            f"little of the adapter survives in {self.dtype}: {self.update_lost:.0%} of its "
            f"updates lie in numbers that do not change at all, and with what the others are off "
            f"by the error is {self.update_error:.0%} of their norm. Merge into float32 (--dtype "
            f"float32), or serve the adapter unmerged."
        )

    def __str__(self) -> str:
        said = (
            f"largest difference in logits {self.difference:.2e} (in {self.dtype}; the adapter "
            f"moves them by up to {self.effect:.2e})"
        )
        if self.update_error is None:
            return said
        if self.update_lost is not None:
            off = f", off by {self.update_error:.2g} of the update's norm" * (self.update_error > 0)
            return f"every weight is base and update, rounded to {self.dtype}{off}; {said}"
        if not self.effect:
            said += ": it does nothing there"
        elif not self.shown:
            said += ", where rounding hides the adapter: its updates alone are the proof"
        near = f"to {self.update_error:.0e} of its norm" if self.update_error else "to the last bit"
        return f"every weight's update, {near}; {said}"


def compared(
    base: Tensor, adapted: Tensor, converted: Tensor, dtypes: set[torch.dtype]
) -> Comparison:
    """Compare logits.

    Args:
        base: logits without the adapter.
        adapted: logits with it.
        converted: logits of what was converted from it.
        dtypes: the dtypes the numbers went through.

    Raises:
        VerificationError: they are not finite.
    """
    if not bool(torch.isfinite(adapted).all()) or not bool(torch.isfinite(converted).all()):
        raise VerificationError(
            "the logits are not finite, so the conversion cannot be checked; nothing was written. "
            "Try --dtype float32."
        )
    scale = max(1.0, float(adapted.abs().max()))
    coarsest = max(dtypes, key=lambda dtype: _TOLERANCE.get(dtype, 1e-1))
    return Comparison(
        difference=float((converted - adapted).abs().max()),
        effect=float((adapted - base).abs().max()),
        tolerance=scale * _TOLERANCE.get(coarsest, 1e-1),
        dtype=str(coarsest).removeprefix("torch."),
    )


def check(comparison: Comparison) -> Comparison:
    """Raise `VerificationError` if the two are further apart than rounding explains."""
    if not comparison.explained:
        raise VerificationError(
            f"the converted model does not answer as the adapted one: {comparison}; rounding "
            f"explains {comparison.tolerance:.0e}. Nothing was written. Please report this, with "
            f"the adapter's config."
        )
    return comparison


def compare(
    base: Tensor, adapted: Tensor, converted: Tensor, dtypes: set[torch.dtype]
) -> Comparison:
    """Compare logits, and raise if they are further apart than rounding explains.

    Raises:
        VerificationError: they differ too much, or are not finite.
    """
    return check(compared(base, adapted, converted, dtypes))
