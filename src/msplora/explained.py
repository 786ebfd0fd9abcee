"""How much of each layer's update a pyramid has: found, and measured on what PEFT loads."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from .adapted import Adapted, put_on
from .config import MSPLoraConfig
from .probing import Probe
from .proving import can_be_float32, compared_in_float32
from .pyramid import Kind, Plan, Site
from .store import factors
from .updates import Blocks, norm_of, updates_of
from .verifying import Comparison, VerificationError, check

_EXACT = 1e-9
"""What may stay unexplained where the two are to answer alike: float32 leaves less."""


@dataclass(frozen=True)
class Explained:
    """How much of one layer's update the pyramid has."""

    site: str
    stack: str
    kind: str
    block: int | None
    norm: float
    """The Frobenius norm of the update."""
    share: float
    """1 - |update - pyramid|² / |update|²."""


def explain(
    found: Plan, updates: Mapping[str, Blocks], sums: Mapping[str, Blocks]
) -> list[Explained]:
    explained = []
    kind_of = {site.key: kind for kind in found.kinds for site in kind.sites}
    for site in found.sites:
        norm = norm_of(updates[site.key])
        rest = [
            (torch.cat([a, a_sum.double()]), torch.cat([b, -b_sum.double()], 1))
            for (a, b), (a_sum, b_sum) in zip(updates[site.key], sums[site.key], strict=True)
        ]
        share = 1 - (norm_of(rest) / norm) ** 2
        explained.append(_told(site, kind_of[site.key], norm, share))
    return explained


def _told(site: Site, kind: Kind, norm: float, share: float) -> Explained:
    return Explained(site.key, kind.stack, kind.name, site.block, norm, share)


def total(explained: Sequence[Explained]) -> float:
    squares = [its.norm**2 for its in explained]
    return sum(its.share * one for its, one in zip(explained, squares, strict=True)) / sum(squares)


def numbers_in_pairs(model: Any, updates: Mapping[str, Blocks]) -> int:
    """What an adapter is itself: of a pyramid each pair once, however many layers share it."""
    if isinstance(next(iter(model.peft_config.values())), MSPLoraConfig):
        return sum(a.numel() + b.numel() for a, b, _ in factors(model).values())
    return sum(a.numel() + b.numel() for its in updates.values() for a, b in its)


def measure(
    adapted: Adapted,
    folder: Path,
    found: Plan,
    updates: Mapping[str, Blocks],
    expected: Sequence[Explained],
    dtype: str,
    again: Callable[[], Adapted],
) -> tuple[list[Explained], Comparison]:
    """What the adapter explains that PEFT loads from `folder`, and how its logits differ.

    Args:
        adapted: the source on its base, which is taken apart.
        folder: what was written.
        found: its plan.
        updates: the source's, of every site.
        expected: what was found to be explained.
        dtype: of the tensors written.
        again: the source on its base once more, in float32.

    Raises:
        VerificationError: it is not what was found; or, where nothing was lost, it answers unlike
            the source.
    """
    probe = Probe(adapted.model)
    loaded = _put_on(adapted.take_base(), folder)
    measured = explain(found, updates, dict(updates_of(loaded)))
    slack = 1e-4 if dtype == "float32" else 2e-2
    for was, now in zip(expected, measured, strict=True):
        if not abs(was.share - now.share) <= slack:
            raise VerificationError(
                f"the pyramid that was written explains {now.share:.4%} of {now.site}'s update, "
                f"not {was.share:.4%}. Nothing was written. Please report this, with the "
                f"adapter's config."
            )
    stored = getattr(torch, dtype)
    its = probe.compared(loaded, stored)
    if any(1 - one.share > _EXACT for one in measured):
        return measured, replace(its, tolerance=math.inf)
    if not its.shown and can_be_float32(loaded):
        del loaded, probe
        its = compared_in_float32(again, lambda base: _put_on(base, folder), stored)
    return measured, check(its)


def _put_on(base: Any, folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the adapter names")  # --base was asked for
        return put_on(base, folder)
