"""The best pyramid for given updates of the layers of one kind, through their factors only.

    minimise   sum_l || D_l - sum_t B_t A_t ||²        D_l = b_l a_l, the update of layer l

over the pairs (B_t, A_t), of given ranks, each shared by given layers. First the shared subspaces,
level by level from the most shared, by joint singular value decompositions; then alternating
least squares: with all A held, the best B of all pairs together solve one linear system, and
likewise the other way round, so no step makes the sum larger.

To the sum belongs a hundred-millionth of sum_t || B_t A_t ||². Without it there need be no best
pyramid: pairs of several levels can grow without end against each other and still come nearer, and
float32 would round away what they leave.

The problem is not convex, so there are two starts, and the better end is kept. One takes for each
level the directions that its layers have in common, however weak: updates that are a pyramid give
it back exactly. The other takes those that explain the most of what is left.

Nothing is ever as large as a weight: the b of all layers span at most K = sum_l R_l directions, in
which the best pairs lie as well, and likewise the a; all of it happens in these coordinates.

Shapes: I in, O out, R a layer's rank, K as above (at most I, or O), L layers, S the sum of one
layer's pairs' ranks, N the sum of all pairs' ranks. All in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Update = tuple[Tensor, Tensor]
"""a (R, I) and b (O, R): the update is b a."""

TOLERANCE = 1e-6
"""Converged: a sweep lowers the error by no more than this share of it."""
MAX_SWEEPS = 500
_RIDGE = 1e-8
_SMALL = 1e-12
"""Of the squared norm of the updates: what a sweep has to gain at least."""
_NO_DIRECTION = 1e-10
"""Of the largest singular value."""


@dataclass(frozen=True)
class Shared:
    """A pair to be found: its rank, and the layers that share it, by their place."""

    rank: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Fit:
    """The pairs found, and what they leave."""

    pairs: tuple[tuple[Tensor, Tensor], ...]
    """A (r, I) and B (O, r) of each pair asked for; in one pair they have the same norm."""
    norms: tuple[float, ...]
    """The squared Frobenius norm of each layer's update."""
    errors: tuple[float, ...]
    """The squared Frobenius norm of what each layer's pairs leave of it."""
    history: tuple[float, ...]
    """The sum that is minimised, at the start and after every sweep."""
    converged: bool


def fit(
    updates: Sequence[Update],
    wanted: Sequence[Shared],
    *,
    tolerance: float = TOLERANCE,
    max_sweeps: int = MAX_SWEEPS,
) -> Fit:
    """Find the pairs whose sums come nearest to the updates, in the Frobenius norm.

    Args:
        updates: of each layer, in depth order.
        wanted: the pairs, the most shared first; the ranks of the pairs of one layer have the same
            sum for all layers.
        tolerance: stop when a sweep lowers the error by no more than this share of it.
        max_sweeps: stop at the latest after so many.
    """
    # Pairs of the same layers are one until the end: how they share their rank out is free.
    together: dict[tuple[int, ...], list[int]] = {}
    for place, its in enumerate(wanted):
        together.setdefault(its.layers, []).append(place)
    ranks = {layers: [wanted[at].rank for at in its] for layers, its in together.items()}
    problem = _Problem(updates, [Shared(sum(ranks[layers]), layers) for layers in together])
    found = None
    for start in (problem.common_directions, problem.largest_directions):
        ended = _alternate(problem, start(), tolerance, max_sweeps)
        if found is None or ended.history[-1] < found.history[-1]:
            found = ended
        if found.error <= 100 * _SMALL * problem.norm:
            break
    assert found is not None
    joined = problem.pairs(found.a_NK, found.b_NK)
    parts = {
        place: (a, b)
        for (layers, places), (whole_a, whole_b) in zip(together.items(), joined, strict=True)
        for place, a, b in zip(
            places, whole_a.split(ranks[layers]), whole_b.split(ranks[layers], 1), strict=True
        )
    }
    return Fit(
        pairs=tuple(parts[place] for place in range(len(wanted))),
        norms=tuple(problem.norms.tolist()),
        errors=tuple(problem.errors(found.a_NK, found.b_NK).tolist()),
        history=tuple(found.history),
        converged=found.converged,
    )


@dataclass
class _End:
    a_NK: Tensor
    b_NK: Tensor
    error: float
    history: list[float]
    converged: bool


def _alternate(problem: _Problem, a_NK: Tensor, tolerance: float, max_sweeps: int) -> _End:
    a_NK = problem.orthonormal(a_NK)
    b_NK = problem.best_b(a_NK)
    error = problem.error(a_NK, b_NK)
    end = _End(a_NK, b_NK, error, [error + problem.penalty(b_NK)], False)
    for _ in range(max_sweeps):
        a_NK = problem.orthonormal(problem.best_a(problem.orthonormal(end.b_NK)))
        b_NK = problem.best_b(a_NK)
        error = problem.error(a_NK, b_NK)
        after = error + problem.penalty(b_NK)
        gain = end.history[-1] - after
        if gain > 0:
            end.a_NK, end.b_NK, end.error = a_NK, b_NK, error
            end.history.append(after)
        if gain <= max(tolerance * after, _SMALL * problem.norm):
            end.converged = True
            break
    return end


class _Problem:
    """The updates and the pairs of one kind, in the coordinates of what the updates span."""

    def __init__(self, updates: Sequence[Update], wanted: Sequence[Shared]) -> None:
        self.wanted = wanted
        self.in_IK, self.a_LKR = _coordinates([a.double().mT for a, _ in updates])
        self.out_OK, self.b_LKR = _coordinates([b.double() for _, b in updates])
        self.ranks = [len(a) for a, _ in updates]
        self.norms = _inner(self.b_LKR, self.a_LKR)
        self.norm = float(self.norms.sum())

        ends = torch.tensor([its.rank for its in wanted]).cumsum(0).tolist()
        self.rows = [slice(end - its.rank, end) for its, end in zip(wanted, ends, strict=True)]
        layers = range(len(updates))
        # Which of the N rows are a layer's, and how many layers two rows share.
        self.rows_LS = torch.tensor(
            [
                [
                    row
                    for its, rows in zip(wanted, self.rows, strict=True)
                    if layer in its.layers
                    for row in range(rows.start, rows.stop)
                ]
                for layer in layers
            ]
        )
        has_LN = torch.zeros(len(updates), ends[-1], dtype=torch.float64)
        has_LN.scatter_(1, self.rows_LS, 1.0)
        self.shared_NN = has_LN.mT @ has_LN

    # Two starts

    def common_directions(self) -> Tensor:
        """The A of each pair from the input directions that the updates of its layers share.

        Taking away the *output* directions that they share leaves of D_l the pairs of less shared
        levels, each with its own A: so the levels come apart whatever their sizes.
        """
        a_NK = self._zeros(self.in_IK)
        rest = list(self._updates())
        taken = [0] * len(rest)
        for its, rows in zip(self.wanted, self.rows, strict=True):
            outs, ins = [], []
            for layer in its.layers:
                left = min(self.ranks[layer], self.rows_LS.shape[1]) - taken[layer]
                out_KR, in_RK = _directions(rest[layer], max(left, its.rank))
                outs.append(out_KR)
                ins.append(in_RK)
            shared_in = torch.linalg.svd(torch.cat(ins), full_matrices=False)[2][: its.rank]
            a_NK[rows.start : rows.start + len(shared_in)] = shared_in
            common_out, _, _ = torch.linalg.svd(torch.cat(outs, 1), full_matrices=False)
            common_out = common_out[:, : its.rank]
            for layer in its.layers:
                rest[layer] = rest[layer] - common_out @ (common_out.mT @ rest[layer])
                taken[layer] += its.rank
        return a_NK

    def largest_directions(self) -> Tensor:
        """The A of each pair from what explains the most of the rest of its layers.

        With the other pairs held, the best pair for some layers is the truncated decomposition of
        the mean of what they still lack.
        """
        a_NK = self._zeros(self.in_IK)
        rest = list(self._updates())
        for its, rows in zip(self.wanted, self.rows, strict=True):
            mean = torch.stack([rest[layer] for layer in its.layers]).mean(0)
            left, sizes, right = torch.linalg.svd(mean, full_matrices=False)
            best = (left[:, : its.rank] * sizes[: its.rank]) @ right[: its.rank]
            for layer in its.layers:
                rest[layer] = rest[layer] - best
            a_NK[rows.start : rows.start + min(its.rank, len(right))] = right[: its.rank]
        return a_NK

    # The sweeps

    def best_b(self, a_NK: Tensor) -> Tensor:
        """The transposed B of all pairs that are best with these A."""
        return self._least_squares(a_NK, self.a_LKR, self.b_LKR)

    def best_a(self, b_NK: Tensor) -> Tensor:
        """The A of all pairs that are best with these transposed B."""
        return self._least_squares(b_NK, self.b_LKR, self.a_LKR)

    def _least_squares(self, held_NK: Tensor, with_LKR: Tensor, other_LKR: Tensor) -> Tensor:
        """Solve ``sum_q |shared by p and q| X_q held_q heldᵀ_p = sum_l D_l heldᵀ_p`` for all p."""
        gram_NN = self.shared_NN * (held_NK @ held_NK.mT)
        right_LSK = (held_NK[self.rows_LS] @ with_LKR) @ other_LKR.mT
        right_NK = torch.zeros(len(held_NK), right_LSK.shape[2], dtype=torch.float64)
        right_NK.index_add_(0, self.rows_LS.flatten(), right_LSK.flatten(0, 1))
        # The held factors are orthonormal, so this is the squared norm of the pairs themselves.
        gram_NN.diagonal().add_(_RIDGE)
        return torch.linalg.solve(gram_NN, right_NK)

    def orthonormal(self, factor_NK: Tensor) -> Tensor:
        """Each pair's rows made orthonormal: the other factor makes up for it."""
        found = torch.zeros_like(factor_NK)
        for rows in self.rows:
            basis = torch.linalg.qr(factor_NK[rows].mT).Q.mT
            found[rows.start : rows.start + len(basis)] = basis
        return found

    def errors(self, a_NK: Tensor, b_NK: Tensor) -> Tensor:
        """What is left of each layer's update, as squared norms: ``(L,)``."""
        a_LKR = torch.cat([self.a_LKR, a_NK[self.rows_LS].mT], 2)
        b_LKR = torch.cat([self.b_LKR, -b_NK[self.rows_LS].mT], 2)
        return _inner(b_LKR, a_LKR)

    def error(self, a_NK: Tensor, b_NK: Tensor) -> float:
        """The sum of the errors."""
        return float(self.errors(a_NK, b_NK).sum())

    def penalty(self, b_NK: Tensor) -> float:
        """What is added to the error for the size of the pairs, whose A are orthonormal."""
        return _RIDGE * float(b_NK.square().sum())

    def pairs(self, a_NK: Tensor, b_NK: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """The pairs as A (r, I) and B (O, r), of the same norm, what counts most first."""
        found = []
        for rows in self.rows:
            a, b = _balanced(a_NK[rows], b_NK[rows].mT)
            found.append((a @ self.in_IK.mT, self.out_OK @ b))
        return tuple(found)

    def _updates(self) -> Tensor:
        return self.b_LKR @ self.a_LKR.mT

    def _zeros(self, basis: Tensor) -> Tensor:
        return torch.zeros(len(self.shared_NN), basis.shape[1], dtype=torch.float64)


def _coordinates(factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of what factors (I, R_l) span, and them in it, filled up with zeros.

    Returns:
        (I, K), (L, K, R) with the largest R.
    """
    basis, coordinates = torch.linalg.qr(torch.cat(list(factors), 1))
    split = coordinates.split([its.shape[1] for its in factors], 1)
    widest = max(its.shape[1] for its in factors)
    padded = [torch.nn.functional.pad(its, (0, widest - its.shape[1])) for its in split]
    return basis, torch.stack(padded)


def _inner(b_LKR: Tensor, a_LKR: Tensor) -> Tensor:
    """``|| b aᵀ ||²`` of each layer, by way of (R, R) matrices that lose no digits."""
    core = _triangle(b_LKR) @ _triangle(a_LKR).mT
    return core.square().sum((1, 2))


def _triangle(factor: Tensor) -> Tensor:
    return torch.linalg.qr(factor, mode="r").R


def _directions(update: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Orthonormal output and input directions of an update, at most `count`: ``(K, R), (R, K)``."""
    left, sizes, right = torch.linalg.svd(update, full_matrices=False)
    count = min(count, int((sizes > sizes[0] * _NO_DIRECTION).sum()))
    return left[:, :count], right[:count]


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product ``b a`` from factors of the same norm."""
    q_a, r_a = torch.linalg.qr(a.mT)
    q_b, r_b = torch.linalg.qr(b)
    left, sizes, right = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = sizes.sqrt()
    balanced_a, balanced_b = (root[:, None] * right) @ q_a.mT, q_b @ (left * root)
    missing = a.shape[0] - len(root)  # more rank than there are directions
    if missing:
        balanced_a = torch.nn.functional.pad(balanced_a, (0, 0, 0, missing))
        balanced_b = torch.nn.functional.pad(balanced_b, (0, missing))
    return balanced_a, balanced_b
