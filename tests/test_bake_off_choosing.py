"""A rate that is tried beyond those given is finished, retried and judged like any other."""

from __future__ import annotations

from typing import Any

import pytest

from bake_offs import BEST, MadeUp, names, prepared, rates_of, rows_in
from msplora.bakeoff.bake_off import outcome_so_far, run_bake_off
from msplora.bakeoff.choosing import next_out
from msplora.bakeoff.report import markdown
from msplora.train.stopping import Interrupted

FURTHER: dict[str, Any] = {"choose": {"tasks": ["one"], "extend": 2}}
BEYOND = "one,pyramid,learning_rate=0.1,seed=0"


@pytest.fixture(autouse=True)
def _best_beyond_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BEST, "pyramid", 1e-1)


def test_one_that_was_stopped_is_finished_before_the_rate_is_chosen(made_up: MadeUp) -> None:
    made_up.stop_after = 9  # three methods have tried three rates
    with pytest.raises(Interrupted):
        run_bake_off(prepared(**FURTHER))
    assert [row["name"] for row in rows_in("out") if row["status"] == "unfinished"] == [BEYOND]
    so_far = outcome_so_far(prepared(**FURTHER))
    assert so_far.choices["pyramid"].beyond == 1e-1
    assert not so_far.is_over
    outcome = run_bake_off(prepared(**FURTHER))
    assert rates_of(outcome) == BEST
    assert outcome.is_over
    assert len(set(made_up.ran)) == len(made_up.ran)


def test_one_that_was_stopped_on_the_second_task_is_finished_there(made_up: MadeUp) -> None:
    both: dict[str, Any] = {"choose": {"tasks": ["one", "two"], "extend": 2}}
    made_up.stop_after = 2 * 9 + 1
    with pytest.raises(Interrupted):
        run_bake_off(prepared(**both))
    assert outcome_so_far(prepared(**both)).choices["pyramid"].beyond == 1e-1
    assert rates_of(run_bake_off(prepared(**both))) == BEST
    assert len(set(made_up.ran)) == len(made_up.ran)


def test_one_that_failed_is_tried_again_on_demand(made_up: MadeUp) -> None:
    made_up.fails = {BEYOND}
    outcome = run_bake_off(prepared(**FURTHER))
    assert rates_of(outcome)["pyramid"] == 1e-2
    assert outcome.is_over
    made_up.fails = set()
    made_up.ran.clear()
    run_bake_off(prepared(**FURTHER))
    assert made_up.ran == []
    outcome = run_bake_off(prepared(**FURTHER), retry_failed=True)
    # Then on to the next one out, and with the new rate to the end.
    assert names(made_up.ran, "one", "pyramid", "seed=0") == [
        BEYOND,
        "one,pyramid,learning_rate=1,seed=0",
    ]
    assert rates_of(outcome) == BEST


def test_a_rule_that_was_changed_is_applied_anew(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BEST, "pyramid", 1e-2)
    run_bake_off(prepared(reject={"after": 0.5, "behind": 0.05}))
    given_up = {row["name"] for row in rows_in("out") if row["status"] == "rejected"}
    assert BEYOND in given_up
    made_up.ran.clear()
    run_bake_off(prepared(reject={"after": 0.5, "behind": 0.04}))
    assert made_up.ran == []
    run_bake_off(prepared(reject={"after": 0.5, "behind": 1.0}))
    assert set(made_up.ran) == given_up


def test_complete_runs_that_a_later_rule_would_give_up_are_counted(made_up: MadeUp) -> None:
    rule: dict[str, Any] = {"reject": {"after": 0.5, "behind": 0.05}}
    run_bake_off(prepared(output="before", **FURTHER))
    later = markdown(outcome_so_far(prepared(output="before", **FURTHER, **rule)), {})
    always = markdown(run_bake_off(prepared(output="always", **FURTHER, **rule)), {})
    given_up = [row for row in rows_in("always") if row["status"] == "rejected"]
    assert given_up
    assert f"{len(given_up)} of the complete runs would have been given up so" in later
    assert "would have been given up so" not in always


@pytest.mark.parametrize(
    ("given", "tried", "best", "following"),
    [
        ([0.01, 0.02], [0.01, 0.02], 0.02, 0.04),
        ([0.01, 0.02], [0.01, 0.02, 0.04], 0.04, 0.08),
        ([0.01, 0.02], [0.01, 0.02], 0.01, 0.005),
        ([0.01, 0.02], [0.01, 0.02, 0.04], 0.02, None),
        ([0.01], [0.01], 0.01, None),
    ],
)
def test_the_next_one_out_is_a_step_of_those_given(
    given: list[float], tried: list[float], best: float, following: float | None
) -> None:
    assert next_out(given, tried, best) == following
