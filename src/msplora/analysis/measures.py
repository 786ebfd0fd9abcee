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
from collections.abc import Iterable, Sequence
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


def triangular(factors_RI: Sequence[Tensor]) -> Tensor:
    """R of the QR decomposition of all factors' transposes side by side: ``(min(I, P), P)``.

    A block of rows at a time, so that besides the factors only R and one block are held.

    Args:
        factors_RI: (R, I) each, of any floating-point dtype.
    """
    columns = sum(len(its) for its in factors_RI)
    step = max(columns, _ROWS)
    stack = torch.empty(columns + step, columns, dtype=torch.float64)
    held = 0  # rows of the stack that are R of all blocks so far
    for start in range(0, factors_RI[0].shape[1], step):
        block = [its[:, start : start + step].mT for its in factors_RI]
        end = held + len(block[0])
        parts = stack[held:end].split([its.shape[1] for its in block], dim=1)
        for part, its in zip(parts, block, strict=True):
            part.copy_(its)
        found = torch.linalg.qr(stack[:end], mode="r").R
        held = len(found)
        stack[:held] = found
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
            shapes = (layers, len(b_PR), most), (layers, most), (layers, len(a_PR), most)
            found = Updates(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))
        found.left[place, :, : len(values)] = q_b @ u
        found.values[place, : len(values)] = values
        found.right[place, :, : len(values)] = q_a @ v_transposed.mT
    assert found is not None
    return found


def numerical_ranks(values_LK: Tensor, out_features: int, in_features: int) -> Tensor:
    """How many singular values float32 tells from zero: ``σ > max(O, I) · ε₃₂ · σ₁``, (L,)."""
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
    rows = []
    for left, values, right in zip(*one, strict=True):
        products = (left.mT @ other.left) * (right.mT @ other.right)  # (L', K, K')
        rows.append(torch.einsum("k,lkm,lm->l", values, products, other.values))
    norms = one.values.norm(dim=-1)[:, None] * other.values.norm(dim=-1)
    return torch.stack(rows) / torch.where(norms > 0, norms, math.nan)


def spans(basis_LPK: Tensor, ranks_L: Tensor) -> Tensor:
    """Each basis with its columns from ``rank`` on set to zero: the space that an update fills."""
    return basis_LPK * (torch.arange(basis_LPK.shape[-1]) < ranks_L[:, None])[:, None, :]


def principal_cosines(one_LPK: Tensor, other_LPK: Tensor) -> Tensor:
    """Cosines of the principal angles between spaces, largest first: ``(L, min(K, K'))``.

    Args:
        one_LPK: `spans`; one of them, (P, K), is compared with all.
        other_LPK: `spans`.
    """
    return torch.linalg.svdvals(one_LPK.mT @ other_LPK)


def overlaps(one_LPK: Tensor, other_LPK: Tensor) -> Tensor:
    """Mean squared cosine of the principal angles between all pairs of spaces: (L, L').

    1 where the smaller lies in the larger, 0 where they are orthogonal; of random spaces of ranks
    r ≥ r' in n dimensions r / n is expected. Not a number beside an empty space.
    """
    smaller = torch.minimum(_dimensions(one_LPK)[:, None], _dimensions(other_LPK))
    squares = torch.stack([(basis.mT @ other_LPK).square().sum((-2, -1)) for basis in one_LPK])
    return squares / torch.where(smaller > 0, smaller, math.nan)


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


def joint_span(spans_LPK: Sequence[Tensor]) -> Tensor:
    """An orthonormal basis of the sum of several spaces of each layer, zero columns at its end."""
    joined = torch.cat(list(spans_LPK), dim=-1)
    left, values, _ = torch.linalg.svd(joined, full_matrices=False)
    return left * (values > _SPAN)[:, None, :]


def inside(basis_LPK: Tensor, values_LK: Tensor, span_LPM: Tensor) -> Tensor:
    """The share of each update's square that lies in a space: ``‖P ΔW‖² / ‖ΔW‖²``, (L,).

    Args:
        basis_LPK: the update's left singular vectors (for columns) or right ones (for rows).
        values_LK: its singular values.
        span_LPM: an orthonormal basis of the space, zero columns allowed.
    """
    projected = (span_LPM.mT @ (basis_LPK * values_LK[:, None, :])).square().sum((-2, -1))
    total = values_LK.square().sum(-1)
    return projected / torch.where(total > 0, total, math.nan)


def explained_by_a_space(basis_LPK: Tensor, values_LK: Tensor) -> Tensor:
    """For k = 1 …: the largest share of all layers' squares in one space of rank k, (…,).

    It is that of the first k singular vectors of all updates side by side.
    """
    joined = basis_LPK.permute(1, 0, 2).flatten(1) * values_LK.flatten()
    return _cumulated(torch.linalg.svdvals(joined), values_LK.square().sum())


def explained_by_a_pair(updates: Updates) -> Tensor:
    """For k = 1 …: ``1 - min_M Σ‖ΔW_i - M‖² / Σ‖ΔW_i‖²`` over all M of rank k, (…,).

    The best M, what one global pair (A, B) could give to every layer, is the mean update cut to
    rank k.
    """
    left, values, right = updates
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for its_left, its_values, its_right in zip(left, values, right, strict=True):
        total.addmm_(its_left * its_values, its_right.mT)
    return _cumulated(torch.linalg.svdvals(total) / math.sqrt(len(values)), values.square().sum())


def _dimensions(basis_LPK: Tensor) -> Tensor:
    """The number of columns that are not zero: (L,)."""
    return (basis_LPK.square().sum(-2) > 0.5).sum(-1)


def _cumulated(values: Tensor, total: Tensor) -> Tensor:
    return values.square().cumsum(0) / torch.where(total > 0, total, math.nan)
