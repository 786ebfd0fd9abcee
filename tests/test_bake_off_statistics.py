"""A bake-off's statistics, and its search, against scipy, hand-counted cases and brute force."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test

from msplora.bakeoff.budgets import LARGEST, Ranks
from msplora.bakeoff.rejecting import Rejecting
from msplora.bakeoff.settings import RejectSettings
from msplora.bakeoff.statistics import Paired, _is_on_front, holm, least_p, sign_flip_p
from msplora.errors import ConfigError
from msplora.page.plotting import mark_of

VALUES = st.lists(st.floats(-1, 1).map(lambda its: round(its, 3)), min_size=2, max_size=9)


def curve(*values: float) -> list[dict[str, float]]:
    return [{"step": 10 * (place + 1), "accuracy": its} for place, its in enumerate(values)]


@given(VALUES)
@settings(max_examples=25, deadline=None)
def test_the_p_value_is_scipys(values: list[float]) -> None:
    found = permutation_test(
        (np.array(values),), np.sum, permutation_type="samples", n_resamples=2**12
    )
    assert sign_flip_p(values) == pytest.approx(float(found.pvalue), abs=1e-12)


def test_large_differences_have_the_p_value_of_small_ones() -> None:
    """Sums in another order differ in their last digits, of large numbers by more."""
    for seed in range(20):
        values = np.random.default_rng(seed).uniform(1e6, 3e6, 9).round(4)
        assert sign_flip_p(list(values)) == least_p(9)


def test_the_p_value_of_differences_all_alike() -> None:
    assert sign_flip_p([0.1] * 6) == 2 / 2**6
    assert least_p(6) == 2 / 2**6
    assert sign_flip_p([0.0] * 6) == 1
    # Drawn, not counted: near what counting would give, and never 0.
    assert 0 < sign_flip_p([0.1] * 20) < 1e-4
    assert sign_flip_p([0.1, -0.1] * 10) > 0.5


def test_no_two_of_many_series_look_alike() -> None:
    marks = [tuple(mark_of(place).values()) for place in range(64)]
    assert len(set(marks)) == 64


def test_holm_by_hand() -> None:
    given_p = {"a": 0.01, "b": 0.04, "c": 0.03}
    pairs = {name: Paired((0.1,), {"t": 0.1}, p) for name, p in given_p.items()}
    adjusted = {name: its.adjusted for name, its in holm(pairs, 3).items()}
    # 3 × 0.01; 2 × 0.03; then 1 × 0.04, raised to the one before.
    assert adjusted == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    # Two that cannot be compared yet are chances of a false one too.
    adjusted = {name: its.adjusted for name, its in holm(pairs, 5).items()}
    assert adjusted == pytest.approx({"a": 0.05, "c": 0.12, "b": 0.12})


@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(0, 5), st.integers(1, 5))))
def test_the_front_is_of_those_whom_nobody_beats(points: dict[str, tuple[int, int]]) -> None:
    scores = {name: float(score) for name, (score, _) in points.items()}
    sizes = {name: size for name, (_, size) in points.items()}
    front = [name for name in points if _is_on_front(name, scores, sizes)]
    for name in points:
        beaten = any(
            (scores[other] >= scores[name] and sizes[other] < sizes[name])
            or (scores[other] > scores[name] and sizes[other] <= sizes[name])
            for other in points
        )
        assert (name in front) is not beaten
    in_order = sorted({(sizes[name], scores[name]) for name in front})
    assert all(small < large for (_, small), (_, large) in pairwise(in_order))


@pytest.mark.parametrize(
    ("values", "rivals", "hopeless"),
    [
        ((0.5,), [(0.6, 0.9)], False),  # too early
        ((0.5, 0.5), [(0.6, 0.9)], True),
        ((0.5, 0.9), [(0.6, 0.9)], False),
        ((0.9, 0.5), [(0.6, 0.9)], False),  # its best counts
        ((0.5, 0.86), [(0.6, 0.9)], False),  # not by more than 0.05
        ((0.5, 0.5), [(0.52, 0.53, 0.9)], False),  # it was no better by then
        ((0.5, 0.5), [], False),
        ((0.5, 0.5), [(0.1, 0.2), (0.6, 0.7)], True),
        ((0.8, 0.8, 0.8, 0.1), [(0.8, 0.8, 0.8, 0.9)], False),  # over already
    ],
)
def test_who_is_given_up(
    values: tuple[float, ...], rivals: list[tuple[float, ...]], hopeless: bool
) -> None:
    rule = RejectSettings(after=0.5, behind=0.05)
    rejecting = Rejecting(rule, "accuracy", [curve(*its) for its in rivals])
    assert bool(rejecting.until_hopeless(curve(*values), 40)) is hopeless


def test_it_is_given_up_at_the_same_evaluation_whenever_one_looks() -> None:
    rejecting = Rejecting(RejectSettings(after=0.5, behind=0.05), "accuracy", [curve(0.6, 0.9)])
    late = curve(0.5, 0.6, 0.95, 0.97)
    assert rejecting.until_hopeless(late[:1], 40) == []
    for looked in (2, 3, 4):
        assert rejecting.until_hopeless(late[:looked], 40) == late[:2]


def test_of_a_loss_less_is_better() -> None:
    def losses(*values: float) -> list[dict[str, float]]:
        return [{"step": place, "loss": its} for place, its in enumerate(values, 1)]

    rejecting = Rejecting(RejectSettings(after=0.5, behind=0.1), "loss", [losses(2.0, 1.0)])
    assert rejecting.until_hopeless(losses(2.0, 1.5), 4)
    assert not rejecting.until_hopeless(losses(2.0, 1.05), 4)


@given(st.integers(1, 5), st.integers(0, 40), st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_the_rank_of_a_budget_is_the_smallest_that_is_taken(
    every: int, offset: int, budget: int
) -> None:
    """Against looking at all ranks, of a method that takes multiples only."""
    looked = []

    def size(rank: int) -> int:
        looked.append(rank)
        if rank % every:
            raise ConfigError(f"{rank} is no multiple of {every}")
        return offset + 7 * rank

    ranks = Ranks(size, patience=every)
    found = ranks.smallest(budget)
    multiples = [(its, offset + 7 * its) for its in range(every, 3001, every)]
    assert found == next(its for its in multiples if its[1] >= budget)
    assert ranks.below(found[0]) == max((its for its in multiples if its < found), default=None)
    assert len(looked) == len(set(looked)) < 200


def test_a_method_that_takes_no_rank_says_why_and_soon() -> None:
    looked = []

    def size(rank: int) -> int:
        looked.append(rank)
        if rank > 5:
            raise ConfigError(f"rank {rank} is too large")
        return rank

    with pytest.raises(ConfigError, match="rank 17 is too large"):
        Ranks(size, patience=10).smallest(100)
    assert max(looked) == 17  # 1, 2, 4, then from 8 on
    assert Ranks(lambda rank: rank, patience=10).smallest(10**6) == (LARGEST, LARGEST)
