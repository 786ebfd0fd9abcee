"""The maths of the analysis: pure functions of an adapter's factors, in float64.

    B = Q_B R_B,   Aᵀ = Q_A R_A   ⇒   s B A = Q_B (s R_B R_Aᵀ) Q_Aᵀ

Norms, singular values, angles between column or row spaces and inner products of updates do not
change under Q. So the factors of all layers of a kind are put side by side, of their QR
decomposition only R is kept (`triangular`), and its columns stand for the factors from then on:
P numbers each, where P is the sum of the ranks, in place of I or O. No dense update is made.

Shapes: I in, O out, R rank, P the ranks of all pairs of a kind, L layers, K singular values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 1024
"""Rows that are decomposed at a time, at least."""
_SPAN = 1e-6
"""Unit vectors span what their singular values above this say."""


class Updates(NamedTuple):
    """The thin singular value decompositions of a batch of updates, values largest first."""

    left: Tensor
    """(L, P, K), orthonormal columns; those of values that a layer does not have are zero."""
    values: Tensor
    """(L, K)."""
    right: Tensor
    """(L, P', K), likewise."""


def triangular(read: Callable[[int], Tensor], ranks: Sequence[int], features: int) -> Tensor:
    """R of the QR decomposition of all factors' transposes side by side: ``(min(I, P), P)``.

    A block of rows at a time, in place: what is held is R, one block and one factor.

    Args:
        read: gives a factor by its number: (R, I), of any floating-point dtype.
        ranks: R of each.
        features: I.
    """
    columns = sum(ranks)
    rows = min(features, columns + max(columns, _ROWS))
    # Column by column, as LAPACK has it: else the decomposition would be made in a copy.
    stack = torch.empty(columns, rows, dtype=torch.float64).mT
    scalars = torch.empty(min(rows, columns), dtype=torch.float64)
    held, start = 0, 0  # rows of the stack that are R of all blocks so far, and rows in it
    while start < features:
        block = slice(start, start + rows - held)
        column = 0
        for place, rank in enumerate(ranks):
            part = read(place)[:, block].mT
            stack[held : held + len(part), column : column + rank] = part
            stack[held + len(part) :, column : column + rank] = 0  # which do not change R
            column += rank
        torch.geqrf(stack, out=(stack, scalars))
        held, start = len(scalars), block.stop
        stack[:held].triu_()
    return stack[:held].clone()


def decompose(sides: Iterable[tuple[Tensor, Tensor]], layers: int, rank: int) -> Updates:
    """The singular value decompositions of ``b aᵀ``, one after the other.

    Args:
        sides: (P, R) and (P', R) of each update; ranks may differ, and the batch has zeros then.
        layers: how many updates there are.
        rank: the largest R.
    """
    found: Updates | None = None
    for place, (b_PR, a_PR) in enumerate(sides):
        q_b, r_b = torch.linalg.qr(b_PR)
        q_a, r_a = torch.linalg.qr(a_PR)
        u, values, v_transposed = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        if found is None:
            most = min(len(b_PR), len(a_PR), rank)
            # Vector by vector, so that those of all layers are one matrix without a copy.
            left, right = (
                torch.zeros(layers, most, len(its), dtype=torch.float64).mT for its in (b_PR, a_PR)
            )
            found = Updates(left, torch.zeros(layers, most, dtype=torch.float64), right)
        found.left[place, :, : len(values)] = q_b @ u
        found.values[place, : len(values)] = values
        found.right[place, :, : len(values)] = q_a @ v_transposed.mT
    assert found is not None
    return found


def numerical_ranks(values_LK: Tensor, out_features: int, in_features: int) -> Tensor:
    """How many singular values are not small beside the largest, (L,).

    ``σ > max(O, I) · ε₃₂ · σ₁``: what a decomposition of the dense update in float32 would tell
    from zero. The values here are of the factors, in float64, and exact far below: a smaller one
    may be a direction that is used, and weak.
    """
    threshold = max(out_features, in_features) * torch.finfo(torch.float32).eps
    return (values_LK > threshold * values_LK[..., :1]).sum(-1)


def effective_ranks(values_LK: Tensor) -> Tensor:
    """exp of the entropy of ``σ / Σσ`` (Roy and Vetterli 2007); 0 of a zero update."""
    shares = values_LK / values_LK.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(values_LK[..., 0] > 0, torch.special.entr(shares).sum(-1).exp(), 0.0)


def stable_ranks(values_LK: Tensor) -> Tensor:
    """``Σσ² / σ₁²``: the squared Frobenius norm over the squared spectral norm; 0 of zero."""
    relative = values_LK / values_LK[..., :1].clamp_min(torch.finfo(torch.float64).tiny)
    return relative.square().sum(-1)


def cosines(one: Updates, other: Updates) -> Tensor:
    """``⟨ΔW_i, ΔW'_j⟩ / (‖ΔW_i‖ ‖ΔW'_j‖)`` for all i, j: (L, L'); not a number beside a zero."""
    found = one.values.new_empty(len(one.values), len(other.values))
    for place, (left, values, right) in enumerate(zip(*one, strict=True)):
        products = _beside(left, other.left).mul_(_beside(right, other.right))  # (L', K', K)
        found[place] = ((products @ values) * other.values).sum(-1)
    norms = one.values.norm(dim=-1)[:, None] * other.values.norm(dim=-1)
    return found / torch.where(norms > 0, norms, math.nan)


def layer_cosines(one: Updates, other: Updates) -> Tensor:
    """``⟨ΔW_l, ΔW'_l⟩ / (‖ΔW_l‖ ‖ΔW'_l‖)`` for all l: (L,); not a number beside a zero."""
    products = (one.left.mT @ other.left) * (one.right.mT @ other.right)  # (L, K, K')
    found = ((products @ other.values[..., None])[..., 0] * one.values).sum(-1)
    norms = one.values.norm(dim=-1) * other.values.norm(dim=-1)
    return found / torch.where(norms > 0, norms, math.nan)


def spans(basis_LPK: Tensor, ranks_L: Tensor) -> Tensor:
    """Each basis with its columns from ``rank`` on set to zero: the space that an update fills."""
    if bool((ranks_L >= basis_LPK.shape[-1]).all()):
        return basis_LPK
    return basis_LPK * (torch.arange(basis_LPK.shape[-1]) < ranks_L[:, None])[:, None, :]


def principal_cosines(one_PK: Tensor, other_LPK: Tensor) -> Tensor:
    """Cosines of the principal angles between a space and others, largest first.

    ``(P, K), (L, P, K') -> (L, min(K, K'))``
    """
    return torch.linalg.svdvals(_beside(one_PK, other_LPK))


def overlaps(one_LPK: Tensor, other_LPK: Tensor) -> Tensor:
    """Mean squared cosine of the principal angles between all pairs of spaces: (L, L').

    1 where the smaller lies in the larger, 0 where they are orthogonal; of random spaces of ranks
    r ≥ r' in n dimensions r / n is expected. Not a number beside an empty space.
    """
    smaller = torch.minimum(_dimensions(one_LPK)[:, None], _dimensions(other_LPK))
    squares = one_LPK.new_empty(len(one_LPK), len(other_LPK))
    for place, basis in enumerate(one_LPK):
        squares[place] = _beside(basis, other_LPK).square_().sum((-2, -1))
    return squares / torch.where(smaller > 0, smaller, math.nan)


def mean_larger(one_L: Tensor, other_L: Tensor) -> Tensor:
    """The mean of max(r, r') over pairs of spaces: over n, what `overlaps` of random ones has.

    Pairs with an empty space have no overlap, and do not count; not a number where all have one.
    """
    larger = torch.maximum(one_L, other_L).double()
    return larger[torch.minimum(one_L, other_L) > 0].mean()


def mean_principal_cosines(basis_LPK: Tensor) -> Tensor:
    """For k = 1 …: the k-th principal cosine, averaged over all pairs of layers that have it."""
    sums = torch.zeros(basis_LPK.shape[-1], dtype=torch.float64)
    counts = torch.zeros_like(sums)
    dimensions = _dimensions(basis_LPK)
    for place in range(len(basis_LPK) - 1):
        others = basis_LPK[place + 1 :]
        found = principal_cosines(basis_LPK[place], others)
        shared = torch.minimum(dimensions[place], dimensions[place + 1 :])
        has = torch.arange(found.shape[-1]) < shared[:, None]
        sums += (found * has).sum(0)
        counts += has.sum(0)
    return (sums / counts)[counts > 0]


def joint_span(bases: Sequence[Tensor]) -> Tensor:
    """An orthonormal basis of the sum of several spaces: (P, M).

    Args:
        bases: (P, K) each, with orthonormal columns.
    """
    left, values, _ = torch.linalg.svd(torch.cat(list(bases), dim=1), full_matrices=False)
    return left[:, values > _SPAN]


def inside(basis_PK: Tensor, values_K: Tensor, span_PM: Tensor) -> Tensor:
    """The share of an update's square that lies in a space: ``‖P ΔW‖² / ‖ΔW‖²``, a number.

    Args:
        basis_PK: the update's left singular vectors (for columns) or right ones (for rows).
        values_K: its singular values.
        span_PM: an orthonormal basis of the space.
    """
    projected = (span_PM.mT @ (basis_PK * values_K)).square().sum()
    total = values_K.square().sum()
    return projected / torch.where(total > 0, total, math.nan)


def explained_by_a_space(basis_LPK: Tensor, values_LK: Tensor) -> Tensor:
    """For k = 1 …: the largest share of all layers' squares in one space of rank k, (…,).

    It is that of the first k singular vectors of all updates side by side.
    """
    return _cumulated(_gram(basis_LPK, values_LK), values_LK.square().sum())


def _gram(basis_LPK: Tensor, values_LK: Tensor) -> Tensor:
    """``Σ ΔW ΔWᵀ`` (or ``ΔWᵀ ΔW``) of all layers: (P, P)."""
    joined = basis_LPK.mT.flatten(0, 1) * values_LK.flatten()[:, None]  # (L K, P)
    return joined.mT @ joined


def explained_by_a_pair(updates: Updates) -> Tensor:
    """For k = 1 …: ``1 - min_M Σ‖ΔW_i - M‖² / Σ‖ΔW_i‖²`` over all M of rank k, (…,).

    The best M, what one global pair (A, B) could give to every layer, is the mean update cut to
    rank k.
    """
    return _cumulated(_gram_of_sum(updates), updates.values.square().sum() * len(updates.values))


def _gram_of_sum(updates: Updates) -> Tensor:
    """``M Mᵀ`` of the sum M of all layers' updates: (P, P)."""
    left, values, right = updates
    total = left.new_zeros(left.shape[1], right.shape[1])
    for its_left, its_values, its_right in zip(left, values, right, strict=True):
        total.addmm_(its_left * its_values, its_right.mT)
    return total @ total.mT


def _beside(one_PK: Tensor, other_LPK: Tensor) -> Tensor:
    """Inner products of a layer's vectors with those of others: (L, K', K).

    As one product: a batched one would copy all of them, where they lie vector by vector.
    """
    return (other_LPK.mT.flatten(0, 1) @ one_PK).unflatten(0, (len(other_LPK), -1))


def _dimensions(basis_LPK: Tensor) -> Tensor:
    """The number of columns that are not zero: (L,)."""
    return (torch.linalg.vector_norm(basis_LPK, dim=-2) > 0.5).sum(-1)


def _cumulated(squares_PP: Tensor, total: Tensor) -> Tensor:
    """The sums of the 1, 2, … largest eigenvalues, as shares of a total."""
    values = torch.linalg.eigvalsh(squares_PP).flip(0).clamp_min(0)
    return values.cumsum(0) / torch.where(total > 0, total, math.nan)
