"""What is to be expected of layers that have nothing to do with each other: by random directions.

A mean over draws from a seed. No draw has as many rows as a weight: of a Gaussian matrix only R of
its QR decomposition counts, whose numbers have a known distribution (Bartlett's).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations_with_replacement

import numpy as np
import torch
from torch import Tensor

from .measures import Updates, explained_by_a_pair, explained_by_a_space

_DRAWN, _FEWEST = 1000, 20
"""Cosines that are drawn, about, and spaces, at least: those of large spaces hardly vary."""
_DIRECTIONS, _MOST = 2000, 50
"""Directions that are drawn of turned updates, about, and draws, at most: what a space explains of
many hardly varies."""


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
    the rows within these axes are drawn as they are, and the rest counts by its R alone.
    """
    generator = np.random.default_rng(0)
    beside = features - larger
    found = np.zeros(smaller)
    draws = max(_FEWEST, _DRAWN // smaller)
    for _ in range(draws):
        within = generator.standard_normal((larger, smaller))
        rest = _gaussian(beside, smaller, generator).numpy()
        basis, _ = np.linalg.qr(np.concatenate([within, rest]))
        found += np.linalg.svd(basis[:larger], compute_uv=False)[:smaller]
    return tuple((found / draws).clip(0, 1).tolist())


def explained_of_turned(
    values_LK: Tensor, out_features: int, in_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What one space, or pair, explains of updates whose singular vectors are random.

    Args:
        values_LK: their singular values, not all zero.
        out_features: the dimensions in which the left singular vectors lie.
        in_features: those of the right ones.

    Returns:
        `explained_by_a_space` of the columns and of the rows, and `explained_by_a_pair`: (K,) each.
    """
    layers, rank = values_LK.shape
    values_LK = (values_LK / values_LK.max()).float()  # a draw needs no more digits, and is large
    generator = np.random.default_rng(0)
    draws = min(_MOST, max(1, _DIRECTIONS // (layers * rank)))
    found = torch.zeros(3, rank, dtype=torch.float64)
    for _ in range(draws):
        updates = Updates(
            _random_vectors(layers, rank, out_features, generator),
            values_LK,
            _random_vectors(layers, rank, in_features, generator),
        )
        for place, curve in enumerate(
            (
                explained_by_a_space(updates.left, values_LK),
                explained_by_a_space(updates.right, values_LK),
                explained_by_a_pair(updates),
            )
        ):
            found[place] += curve[:rank] / draws
    columns, rows, pair = found
    return columns, rows, pair


def _random_vectors(
    layers: int, count: int, features: int, generator: np.random.Generator
) -> Tensor:
    """Orthonormal vectors for each layer, independent of the others', as `Updates` has them."""
    joined = _gaussian(features, layers * count, generator)
    basis_LPK, r_LKK = torch.linalg.qr(joined.mT.unflatten(0, (layers, count)).mT)
    # The decomposition picks signs that would make first vectors a little alike.
    return basis_LPK.mul_(r_LKK.diagonal(dim1=-2, dim2=-1).sign()[:, None])


def _gaussian(rows: int, columns: int, generator: np.random.Generator) -> Tensor:
    """Random numbers of which only the columns' inner products count: no more rows than columns."""
    shape = min(rows, columns), columns
    found = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    if rows > columns:
        diagonal = np.sqrt(generator.chisquare(rows - np.arange(columns)))
        found.triu_(1).diagonal().copy_(torch.from_numpy(diagonal))
    return found
