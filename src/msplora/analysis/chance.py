"""The principal angles of random spaces: what those between layers are to be compared with."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations_with_replacement

import numpy as np
import torch
from torch import Tensor

_DRAWN, _FEWEST = 1000, 20
"""Cosines that are drawn, about, and spaces, at least: those of large spaces hardly vary."""


def random_principal_cosines(ranks_L: Tensor, features: int) -> Tensor:
    """As `mean_principal_cosines`, of random spaces of the layers' ranks: (…,).

    Args:
        ranks_L: of each layer.
        features: the dimensions in which the spaces lie.
    """
    ranks, counts = torch.unique(ranks_L[ranks_L > 0], return_counts=True)
    dimensions = list(zip(ranks.tolist(), counts.tolist(), strict=True))
    most = max((rank for rank, _ in dimensions), default=0)
    sums = torch.zeros(most, dtype=torch.float64)
    pairs = torch.zeros_like(sums)
    for (one, ones), (other, others) in combinations_with_replacement(dimensions, 2):
        count = ones * (ones - 1) // 2 if one == other else ones * others
        smaller = min(one, other)
        if count:
            found = _mean_cosines(smaller, max(one, other), features)
            sums[:smaller] += count * torch.tensor(found, dtype=torch.float64)
            pairs[:smaller] += count
    return (sums / pairs)[pairs > 0]


@lru_cache(maxsize=1024)
def _mean_cosines(smaller: int, larger: int, features: int) -> tuple[float, ...]:
    """The cosines between two random spaces, largest first: a mean over draws from a seed.

    One space may be that of the first `larger` axes. Of the other, the span of a Gaussian matrix,
    the rows within these axes are drawn as they are; of the rest only R of its QR decomposition
    counts, whose numbers have a known distribution (Bartlett's), so nothing has `features` rows.
    """
    generator = np.random.default_rng(0)
    beside = features - larger
    found = np.zeros(smaller)
    draws = max(_FEWEST, _DRAWN // smaller)
    for _ in range(draws):
        within = generator.standard_normal((larger, smaller))
        if beside > smaller:
            rest = np.triu(generator.standard_normal((smaller, smaller)), 1)
            degrees = beside - np.arange(smaller)
            rest[np.diag_indices(smaller)] = np.sqrt(generator.chisquare(degrees))
        else:
            rest = generator.standard_normal((beside, smaller))
        basis, _ = np.linalg.qr(np.concatenate([within, rest]))
        found += np.linalg.svd(basis[:larger], compute_uv=False)[:smaller]
    return tuple((found / draws).clip(0, 1).tolist())
