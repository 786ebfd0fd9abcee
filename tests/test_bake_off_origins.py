"""What a report says of where its runs are from, and that it counts no rows of another file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bake_offs import SPEC, MadeUp, prepared, rows_in
from msplora.bakeoff.bake_off import Outcome, outcome_so_far, run_bake_off
from msplora.bakeoff.origins import origins
from msplora.bakeoff.report import markdown, page
from msplora.bakeoff.statistics import standings
from msplora.errors import MSPLoraError
from msplora.sweep.folder import SweepFolderError

ROWS = Path("out/results.jsonl")


def finals_of(outcome: Outcome, entrant: str) -> list[Any]:
    return [row for run, row in outcome.finals.items() if run.entrant == entrant]


def told(outcome: Outcome, what: str) -> str:
    return next((its for its in origins(outcome) if its.startswith(f"{what}: ")), "")


def test_pairs_that_were_made_on_two_things_are_counted(made_up: MadeUp) -> None:
    outcome = run_bake_off(prepared())
    alike = "pairs: {} of 8 with lora are of one commit, hardware and versions on both sides"
    assert told(outcome, "pairs") == alike.format(8)
    first, *_ = finals_of(outcome, "pyramid")
    first.commit = "def"
    finals_of(outcome, "small")[1].hardware = "another machine"
    finals_of(outcome, "small")[2].commit = "abc-dirty"
    assert told(outcome, "pairs").startswith(alike.format(5))
    assert "in the others they differ" in page(outcome, {})
    # What went on under another commit was made on two things itself.
    first.commit, first.earlier = "abc", [{"commit": "b4", "hardware": "old", "versions": {}}]
    assert told(outcome, "pairs").startswith(alike.format(5))
    assert told(outcome, "resumed").endswith("versions than they began on: b4 (old)")
    first.earlier = [{"commit": None, "hardware": None, "versions": {}}]
    assert told(outcome, "resumed").startswith("resumed: on what 1 of the runs began was not")
    first.earlier = []
    assert told(outcome, "pairs").startswith(alike.format(6))


def test_seconds_are_of_the_commonest_hardware_alone(made_up: MadeUp) -> None:
    outcome = run_bake_off(prepared())
    assert "in it, on the machine of the run." in markdown(outcome, {})
    assert "‡" not in markdown(outcome, {})
    for row in finals_of(outcome, "small"):
        row.hardware, row.train_seconds = "a quick one", 0.1
    slow, *_ = finals_of(outcome, "pyramid")
    slow.hardware, slow.train_seconds = "a slow one", 100.0
    found = {its.name: (its.seconds, its.all_timed) for its in standings(outcome)}
    assert found == {"lora": (1.0, True), "pyramid": (1.0, False), "small": (None, False)}
    text = markdown(outcome, {})
    assert "| 1 ‡ |" in text
    assert "in it, of the runs on a machine alone." in text
    assert "‡ of some runs only" in text


def test_rows_of_no_method_or_rate_of_the_file_are_named_and_not_counted(
    made_up: MadeUp,
) -> None:
    made_up.fails = {"two,pyramid,learning_rate=0.01,seed=1"}
    run_bake_off(prepared())
    fewer = {name: SPEC["methods"][name] for name in ("lora", "small")}
    outcome = outcome_so_far(prepared(methods=fewer))
    others = [row["name"] for row in rows_in("out") if "pyramid" in row["name"]]
    assert told(outcome, "not counted").startswith(f"not counted: {len(others)} rows of no method")
    assert told(outcome, "not counted").endswith(f"such as {others[0]}")
    assert told(outcome, "runs").startswith(f"runs: {len(rows_in('out')) - len(others)} complete;")
    assert "What went wrong" not in markdown(outcome, {})
    assert told(outcome_so_far(prepared()), "not counted") == ""


def test_a_folder_of_another_bake_off_is_not_taken_for_this_one(made_up: MadeUp) -> None:
    run_bake_off(prepared())
    before = ROWS.read_text()
    other: dict[str, Any] = {"methods": {"dora": {"method": "dora"}}}
    for begin in (run_bake_off, outcome_so_far):
        with pytest.raises(SweepFolderError, match=r"holds another bake-off: none of its \d+ runs"):
            begin(prepared(**other))
    assert ROWS.read_text() == before


def joined(*rows: dict[str, Any]) -> None:
    ROWS.write_text(ROWS.read_text() + "".join(f"{json.dumps(row)}\n" for row in rows))


def test_of_two_rows_of_one_run_that_with_a_result_counts(made_up: MadeUp) -> None:
    run_bake_off(prepared())
    made_up.ran.clear()
    row = rows_in("out")[0]
    joined({**row, "status": "unfinished", "value": None}, row)
    assert run_bake_off(prepared()).is_over
    assert made_up.ran == []


def test_two_results_of_one_run_are_refused(made_up: MadeUp) -> None:
    run_bake_off(prepared())
    row = rows_in("out")[0]
    joined({**row, "value": 0.5})
    said = rf"results\.jsonl has two complete rows of {row['name']}, with accuracy 0\.9 and 0\.5"
    with pytest.raises(MSPLoraError, match=said):
        outcome_so_far(prepared())
