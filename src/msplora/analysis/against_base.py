"""What the base says of an adapter's updates: their relative norms, and intruder dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .base import Base
from .intruders import intruders
from .results import KindResult, Measures
from .stored import StoredKind


def with_base(
    result: KindResult,
    kind: StoredKind,
    base: Base,
    intruder_vectors: int,
    done: Callable[[], None] = lambda: None,
) -> KindResult:
    """Fill in what needs the base's weights, of which one is held at a time.

    A weight that the checkpoint stores in another shape, as several in one, is left out.
    """
    sites = []
    for found, site in zip(result.sites, kind.sites, strict=True):
        weight_OI = base.weight(site.key, kind.matrix)
        if weight_OI is not None:
            pairs = [kind.pairs[place] for place in site.pairs]
            factors = [(*pair.read(), pair.scale) for pair in pairs]
            a_RI = torch.cat([a_RI.double() for a_RI, _, _ in factors])
            b_OR = torch.cat([b_OR.double() * scale for _, b_OR, scale in factors], dim=1)
            norm = float(torch.linalg.vector_norm(weight_OI, dtype=torch.float64))
            found = replace(
                found,
                update=_beside(found.update, norm),
                levels={level: _beside(its, norm) for level, its in found.levels.items()},
                base_norm=norm,
                intruders=(
                    intruders(weight_OI, a_RI, b_OR, intruder_vectors) if intruder_vectors else None
                ),
            )
        sites.append(found)
        done()
    return replace(result, sites=tuple(sites))


def _beside(update: Measures, norm: float) -> Measures:
    """With its norm in parts of the weight's."""
    return replace(update, relative_norm=update.norm / norm if norm else None)
