"""What is to be expected of layers that have nothing to do with each other: by random directions.

A mean over draws from a seed. No draw has as many rows as a weight: of a Gaussian matrix only R of
its QR decomposition counts, whose numbers have a known distribution (Bartlett's). No matrix of all
layers' directions is made: of many, this would be larger than a pyramid's factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import combinations_with_replacement

import numpy as np
import torch
from torch import Tensor

_DRAWN, _FEWEST = 1000, 20
"""Cosines that are drawn, about, and spaces, at least: those of large spaces hardly vary."""
_DIRECTIONS, _MOST = 2000, 100
"""Directions that are drawn of turned updates, about, and draws, at most: what a space explains of
many hardly varies."""
_STEPS = 12
"""Blocks of a Krylov space: eight are within a hundredth of every eigenvalue."""


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
        rest = _gaussian(1, beside, 0, smaller, generator)[0].numpy()
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
    squares_LK = values_LK.square()
    generator = np.random.default_rng(0)
    draws = min(_MOST, max(1, _DIRECTIONS // (layers * rank)))
    left, right = (
        _random_vectors(draws, layers, rank, its, generator) for its in (out_features, in_features)
    )
    grams = (
        (left, partial(_through, left, squares_LK, left)),
        (right, partial(_through, right, squares_LK, right)),
        (left, partial(_gram_of_sum, left, values_LK, right)),
    )
    found = [
        _largest(gram, (draws, vectors[-1].shape[-2], rank), generator).double().mean(0).cumsum(0)
        for vectors, gram in grams
    ]
    columns, rows, pair = torch.stack(found) / squares_LK.double().sum()
    return columns, rows, pair / layers


def _random_vectors(
    draws: int, layers: int, count: int, features: int, generator: np.random.Generator
) -> list[Tensor]:
    """Orthonormal vectors for each layer, independent of the others': L of (draws, P_l, count).

    All layers' side by side are taken for R of their QR decomposition: those of layer l fill the
    first P_l = min(features, (l + 1) count) rows, and zeros follow, which are not kept.
    """
    found = []
    for layer in range(layers):
        basis, r = torch.linalg.qr(_gaussian(draws, features, layer * count, count, generator))
        # The decomposition picks signs that would make first vectors a little alike.
        found.append(basis.mul_(r.diagonal(dim1=-2, dim2=-1).sign()[:, None]))
    return found


def _gaussian(
    draws: int, features: int, start: int, count: int, generator: np.random.Generator
) -> Tensor:
    """Gaussian matrices of so many rows: `count` columns of their R, from one on, as far as these
    go: (draws, min(features, start + count), count).

    Of a Gaussian matrix R has Gaussian numbers above its diagonal, on it the roots of chi squares
    of as many degrees of freedom as there are rows from there on, and nothing below.
    """
    shape = draws, min(features, start + count), count
    found = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    below = found[:, start:]  # from the diagonal on; no row where all columns are beyond the last
    freedoms = features - start - np.arange(below.shape[1])
    sizes = np.sqrt(generator.chisquare(freedoms, (draws, len(freedoms))))
    below.triu_(1).diagonal(dim1=-2, dim2=-1).copy_(torch.from_numpy(sizes))
    return found


def _through(
    left: Sequence[Tensor], values_LK: Tensor, right: Sequence[Tensor], x_PQ: Tensor
) -> Tensor:
    """``Σ U_l S_l V_lᵀ x`` of each draw, of vectors that fill the first rows: (draws, P', Q)."""
    found = x_PQ.new_zeros(len(x_PQ), left[-1].shape[-2], x_PQ.shape[-1])
    for u, values_K, v in zip(left, values_LK, right, strict=True):
        found[:, : u.shape[-2]] += u @ (values_K[:, None] * (v.mT @ x_PQ[:, : v.shape[-2]]))
    return found


def _gram_of_sum(
    left: Sequence[Tensor], values_LK: Tensor, right: Sequence[Tensor], x_PQ: Tensor
) -> Tensor:
    """``M Mᵀ x`` of the sum ``M = Σ U_l S_l V_lᵀ`` of each draw: (draws, P, Q)."""
    return _through(left, values_LK, right, _through(right, values_LK, left, x_PQ))


def _largest(
    gram: Callable[[Tensor], Tensor], shape: tuple[int, int, int], generator: np.random.Generator
) -> Tensor:
    """The largest eigenvalues of matrices that are known by what they do: (draws, count).

    They are those within the block Krylov space of a random start (Lanczos, every block kept
    orthogonal to all before): exact where that is everything, and otherwise too small by less than
    a thousandth, where all are about as large.

    Args:
        gram: the product of each of the matrices, (size, size), with (draws, size, …).
        shape: draws, size, and how many eigenvalues.
        generator: of the start.
    """
    draws, size, count = shape
    held = min(size, _STEPS * count)
    basis = torch.empty(draws, size, held)
    within = torch.zeros(draws, held, held)  # what is done within the space: its upper half
    block = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    for start in range(0, held, count):
        known, its = basis[..., :start], basis[..., start : start + count]
        for _ in range(2):  # once leaves what rounding makes of a block that is nearly known
            block, _ = torch.linalg.qr(block - known @ (known.mT @ block))
        its.copy_(block[..., : its.shape[-1]])
        block = gram(its)
        known = basis[..., : start + its.shape[-1]]
        within[:, : known.shape[-1], start : known.shape[-1]] = known.mT @ block
    return torch.linalg.eigvalsh(within, UPLO="U").flip(-1)[:, :count].clamp_min(0)
