"""How much of each layer's update a pyramid has: found, and measured on what PEFT loads."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .adapted import Adapted, put_on
from .probing import Probe
from .pyramid import Kind, Plan, Site
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


def measure(
    adapted: Adapted,
    folder: Path,
    found: Plan,
    updates: Mapping[str, Blocks],
    expected: Sequence[Explained],
    dtype: str,
) -> tuple[list[Explained], Comparison]:
    """What the adapter explains that PEFT loads from `folder`, and how its logits differ.

    Raises:
        VerificationError: it is not what was found; or, where nothing was lost, it answers unlike
            the source.
    """
    probe = Probe(adapted.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the adapter names")  # --base was asked for
        loaded = put_on(adapted.take_base(), folder)
    measured = explain(found, updates, dict(updates_of(loaded)))
    slack = 1e-4 if dtype == "float32" else 2e-2
    for was, now in zip(expected, measured, strict=True):
        if not abs(was.share - now.share) <= slack:
            raise VerificationError(
                f"the pyramid that was written explains {now.share:.4%} of {now.site}'s update, "
                f"not {was.share:.4%}. Nothing was written. Please report this, with the "
                f"adapter's config."
            )
    its = probe.compared(loaded, getattr(torch, dtype))
    if all(1 - one.share <= _EXACT for one in measured):
        return measured, check(its)
    return measured, replace(its, tolerance=math.inf)
