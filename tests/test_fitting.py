"""The best pyramid for given updates, against dense least squares in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from msplora.fitting import Fit, Shared, Update, fit
from msplora.pyramid import Level

LAYERS = 6


def shared_by(
    layers: int, ranks: tuple[int, ...] = (4, 2, 1), groups: tuple[int, ...] = (1, 3, 0)
) -> list[Shared]:
    """Who shares in a pyramid."""
    found = []
    for rank, count in zip(ranks, groups, strict=True):
        level = Level("its", rank, count, alpha=1.0)
        for group in range(level.groups_among(layers)):
            members = [at for at in range(layers) if level.group_of(at, layers) == group]
            found.append(Shared(rank, tuple(members)))
    return found


def stacked(wanted: list[Shared], pairs: list[tuple[Tensor, Tensor]], layers: int) -> list[Update]:
    """The update of each layer as one pair of factors."""
    own = [
        [pair for its, pair in zip(wanted, pairs, strict=True) if layer in its.layers]
        for layer in range(layers)
    ]
    return [(torch.cat([a for a, _ in its]), torch.cat([b for _, b in its], 1)) for its in own]


def pyramid_updates(
    wanted: list[Shared], layers: int, sizes: tuple[float, ...], decay: float = 1.0
) -> list[Update]:
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for its in wanted:
        size = sizes[0] if len(its.layers) == layers else sizes[1 if len(its.layers) > 1 else 2]
        a = torch.randn(its.rank, 20, generator=generator) * size
        pairs.append(
            (
                a * decay ** torch.arange(its.rank)[:, None],
                torch.randn(24, its.rank, generator=generator),
            )
        )
    return stacked(wanted, pairs, layers)


def random_updates(layers: int, rank: int = 5) -> list[Update]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rank, 20, generator=generator), torch.randn(24, rank, generator=generator))
        for _ in range(layers)
    ]


def dense_errors(updates: list[Update], wanted: list[Shared], found: Fit) -> list[float]:
    sums = stacked(wanted, [(a, b) for a, b in found.pairs], len(updates))
    return [
        float((b.double() @ a.double() - b_found @ a_found).square().sum())
        for (a, b), (a_found, b_found) in zip(updates, sums, strict=True)
    ]


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 6, 11])
@pytest.mark.parametrize(
    ("sizes", "decay"), [((1, 1, 1), 1.0), ((0.05, 1, 0.2), 0.3), ((1, 0.01, 0.1), 0.1)]
)
def test_a_pyramid_is_found_again(layers: int, sizes: tuple[float, ...], decay: float) -> None:
    wanted = shared_by(layers)
    updates = pyramid_updates(wanted, layers, sizes, decay)
    found = fit(updates, wanted)
    for error, norm in zip(dense_errors(updates, wanted, found), found.norms, strict=True):
        assert error <= 1e-9 * norm


@pytest.mark.parametrize("wanted", [shared_by(6), shared_by(6, (3, 2, 2), (2, 3, 0))])
def test_the_errors_told_are_the_dense_ones(wanted: list[Shared]) -> None:
    updates = random_updates(6)
    found = fit(updates, wanted)
    assert found.errors == pytest.approx(dense_errors(updates, wanted, found), rel=1e-9)
    norms = [float((b.double() @ a.double()).square().sum()) for a, b in updates]
    assert found.norms == pytest.approx(norms, rel=1e-12)
    assert found.history[-1] == pytest.approx(sum(found.errors), rel=1e-4)


def test_no_sweep_makes_the_sum_larger() -> None:
    found = fit(random_updates(6), shared_by(6), tolerance=0.0, max_sweeps=60)
    assert len(found.history) > 10
    assert all(later < earlier for earlier, later in itertools.pairwise(found.history))


def test_neither_factor_can_be_bettered() -> None:
    """At the end, dense least squares over all B (and over all A) hardly finds anything better."""
    updates, wanted = random_updates(LAYERS), shared_by(LAYERS)
    found = fit(updates, wanted)
    assert found.converged
    dense = [b.double() @ a.double() for a, b in updates]
    for transposed in (False, True):
        rows = []
        for layer in range(LAYERS):
            held = [b if transposed else a.mT for a, b in found.pairs]
            own = [
                its if layer in shared.layers else torch.zeros_like(its)
                for its, shared in zip(held, wanted, strict=True)
            ]
            rows.append(torch.cat(own, 1))
        design, goal = torch.cat(rows), torch.cat([d if transposed else d.mT for d in dense])
        best = torch.linalg.lstsq(design, goal, driver="gelsd").solution
        error = float((design @ best - goal).square().sum())
        assert sum(found.errors) * (1 - 1e-5) <= error <= sum(found.errors) * (1 + 1e-9)


def test_pairs_do_not_grow_against_each_other() -> None:
    """With two layers there is no best pyramid without a bound: it comes nearer for ever."""
    updates = random_updates(2, rank=8)
    found = fit(updates, shared_by(2, (4, 2, 1)))
    largest = max(float(a.norm() * b.norm()) for a, b in found.pairs)
    assert largest <= 1e3 * math.sqrt(sum(found.norms))
    rounded = [(a.float(), b.float()) for a, b in found.pairs]
    again = stacked(shared_by(2, (4, 2, 1)), [(a.double(), b.double()) for a, b in rounded], 2)
    for (a, b), (wanted_a, wanted_b), error in zip(again, updates, found.errors, strict=True):
        rest = float((b @ a - wanted_b.double() @ wanted_a.double()).square().sum())
        assert rest == pytest.approx(error, rel=1e-3)


def test_one_level_is_the_truncated_decomposition() -> None:
    """One pair for all layers: that of the mean. One for each: of each by itself."""
    updates = random_updates(4)
    dense = torch.stack([b.double() @ a.double() for a, b in updates])
    together = fit(updates, [Shared(3, (0, 1, 2, 3))])
    kept = torch.linalg.svdvals(dense.mean(0))[:3]
    best = float(dense.square().sum() - 4 * kept.square().sum())
    assert sum(together.errors) == pytest.approx(best, rel=1e-5)
    apart = fit(updates, [Shared(3, (layer,)) for layer in range(4)])
    lost = torch.linalg.svdvals(dense)[:, 3:].square().sum(1)
    assert apart.errors == pytest.approx(lost.tolist(), rel=1e-5)


def test_levels_that_share_alike_share_one_rank_out() -> None:
    updates = random_updates(3)
    apart = fit(updates, [Shared(2, (0, 1, 2)), Shared(1, (0, 1, 2))])
    together = fit(updates, [Shared(3, (0, 1, 2))])
    assert sum(apart.errors) == pytest.approx(sum(together.errors), rel=1e-9)
    assert [tuple(a.shape) for a, _ in apart.pairs] == [(2, 20), (1, 20)]


def test_more_rank_than_there_is_leaves_nothing() -> None:
    updates = random_updates(3, rank=2)
    found = fit(updates, shared_by(3, ranks=(30, 30, 30)))
    assert [tuple(a.shape) for a, _ in found.pairs] == [(30, 20)] * 7
    assert sum(found.errors) <= 1e-12 * sum(found.norms)
    assert all(bool(torch.isfinite(its).all()) for pair in found.pairs for its in pair)


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 20), (20, 1), (5, 20)])
def test_more_rank_than_a_narrow_side_has_leaves_nothing(outputs: int, inputs: int) -> None:
    """As a gate of one output has in a mixture of experts."""
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=random) for shape in ((8, inputs), (outputs, 8)))
    found = fit([(a.double(), b.double())], [Shared(8, (0,))])
    (fitted_a, fitted_b) = found.pairs[0]
    assert (fitted_a.shape, fitted_b.shape) == (a.shape, b.shape)
    torch.testing.assert_close(fitted_b @ fitted_a, (b @ a).double(), atol=1e-5, rtol=1e-5)


def test_layers_of_unlike_rank_fit_together() -> None:
    updates = [*random_updates(2, rank=5), *random_updates(1, rank=1)]
    wanted = shared_by(3)
    found = fit(updates, wanted)
    assert found.errors == pytest.approx(dense_errors(updates, wanted, found), rel=1e-6, abs=1e-9)


def test_both_factors_of_a_pair_have_the_same_norm() -> None:
    for a, b in fit(random_updates(6), shared_by(6)).pairs:
        assert math.isclose(float(a.norm()), float(b.norm()), rel_tol=1e-9)
