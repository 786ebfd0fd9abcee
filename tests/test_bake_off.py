"""A bake-off runs what is missing and only that, each method at its best rate, and reports it.

Where only the bookkeeping counts, runs are made up (`bake_offs.py`).
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from bake_offs import (
    BEST,
    SPEC,
    MadeUp,
    accuracy,
    content_of,
    names,
    prepared,
    rates_of,
    rows_in,
    spec,
)
from msplora.bakeoff import engines, running
from msplora.bakeoff.bake_off import _Running, outcome_so_far, run_bake_off
from msplora.bakeoff.engines import OnRay
from msplora.bakeoff.reading import Run, make_bake_off
from msplora.bakeoff.rejecting import Rejecting
from msplora.bakeoff.report import NOT_OVER, draw, markdown, page, write_report
from msplora.bakeoff.running import Job
from msplora.bakeoff.settings import RejectSettings
from msplora.bakeoff.statistics import standings
from msplora.errors import MSPLoraError
from msplora.sweep.folder import SweepFolderError
from msplora.sweep.rows import Row, Rows
from msplora.sweep.running import Outcome as RunOutcome
from msplora.sweep.running import SweepSignals
from msplora.train.stopping import Interrupted
from runs import msplora, write_config


def test_each_method_runs_at_its_own_best_rate_on_all_tasks_and_seeds(made_up: MadeUp) -> None:
    outcome = run_bake_off(prepared())
    assert rates_of(outcome) == BEST
    counted = [(run.entrant, run.task, run.learning_rate, run.seed) for run in outcome.finals]
    assert counted == [
        (name, task, BEST[name], seed)
        for task in ("one", "two")
        for name in BEST
        for seed in (0, 1)
    ]
    for run, row in outcome.finals.items():
        assert row is not None
        wanted = accuracy(run.entrant, run.learning_rate, run.task, run.seed)
        assert (row.status, row.value) == ("complete", wanted)
    # Rates are chosen with the first seed on the first task only.
    others = [name for name in made_up.ran if "seed=1" in name or name.startswith("two,")]
    assert len(others) == 3 * 3
    assert len(set(made_up.ran)) == len(made_up.ran)  # nothing is run twice


def test_the_best_rate_at_an_end_is_followed_outwards(made_up: MadeUp) -> None:
    outcome = run_bake_off(prepared(choose={"tasks": ["one"], "extend": 2}))
    tried = {name: [its.rate for its in choice.tried] for name, choice in outcome.choices.items()}
    # The pyramid's best, 1e-2, is the highest that was given: one beyond it is worse, and enough.
    assert tried == {
        "lora": [1e-4, 1e-3, 1e-2],
        "pyramid": [1e-4, 1e-3, 1e-2, 1e-1],
        "small": [1e-4, 1e-3, 1e-2],
    }
    kept = run_bake_off(prepared(output="kept", choose={"tasks": ["one"], "extend": 0}))
    assert [its.rate for its in kept.choices["pyramid"].tried] == [1e-4, 1e-3, 1e-2]


def test_rates_that_are_no_longer_in_the_file_do_not_count(made_up: MadeUp) -> None:
    run_bake_off(prepared(choose={"tasks": ["one"], "extend": 0}))  # 1e-4, 1e-3, 1e-2
    finer: dict[str, Any] = {"learning_rates": [2e-4, 4e-4], "choose": {"tasks": ["one"]}}
    assert not outcome_so_far(prepared(**finer)).is_over  # as many were tried, and others
    outcome = run_bake_off(prepared(**finer))
    assert outcome.is_over
    tried = {name: [its.rate for its in choice.tried] for name, choice in outcome.choices.items()}
    assert tried == {name: [2e-4, 4e-4, 8e-4] for name in BEST}
    assert rates_of(outcome) == dict.fromkeys(BEST, 8e-4)
    # One that was run for an earlier file counts where it is reached, and is not run again.
    made_up.ran.clear()
    coarser = run_bake_off(prepared(learning_rates=[1e-4, 1e-3], choose={"tasks": ["one"]}))
    assert [its.rate for its in coarser.choices["pyramid"].tried] == [1e-4, 1e-3, 1e-2]
    assert names(made_up.ran, "one", "pyramid", "seed=0") == []


def test_a_report_of_nothing_is_refused(made_up: MadeUp) -> None:
    with pytest.raises(SweepFolderError, match=r"no run of the bake-off in .*out was begun"):
        write_report(outcome_so_far(prepared()))
    assert not Path("out").exists()
    assert run_bake_off(prepared()).is_over


def test_one_rate_is_not_said_to_be_followed_outwards(made_up: MadeUp) -> None:
    several, one = (
        markdown(outcome_so_far(prepared(learning_rates=rates)), {})
        for rates in ([1e-3, 1e-2], [1e-3])
    )
    assert "the next one beyond it is tried too" in several
    assert "the next one beyond it" not in one
    assert "is the one that was given for it." in one
    assert "with the best mean" not in one
    assert "each at its own best" in page(outcome_so_far(prepared()), {})
    assert "each at its own best" not in page(outcome_so_far(prepared(learning_rates=[1e-3])), {})


@pytest.mark.parametrize("rule", [None, {"after": 0.5, "behind": 1.0}])
def test_what_another_rule_gave_up_is_still_to_be_made(rule: Any, made_up: MadeUp) -> None:
    first = run_bake_off(prepared(reject={"after": 0.5, "behind": 0.05}))
    assert first.is_over
    assert any(row.status == "rejected" for row in first.rows)
    assert not outcome_so_far(prepared(reject=rule)).is_over
    again = run_bake_off(prepared(reject=rule))
    assert again.is_over
    assert all(row.status == "complete" for row in again.rows)


def test_a_rate_far_behind_is_given_up_and_changes_no_choice(made_up: MadeUp) -> None:
    everything = run_bake_off(prepared(output="all"))
    quick = run_bake_off(prepared(reject={"after": 0.5, "behind": 0.05}))
    assert rates_of(quick) == rates_of(everything)
    given_up = {row.name: row for row in quick.rows if row.status == "rejected"}
    # Of the rates that are ten times off, all but the first that was tried.
    assert set(given_up) == {
        "one,lora,learning_rate=0.01,seed=0",
        "one,lora,learning_rate=0.0001,seed=0",
        "one,pyramid,learning_rate=0.0001,seed=0",
        "one,pyramid,learning_rate=0.1,seed=0",
        "one,small,learning_rate=0.01,seed=0",
        "one,small,learning_rate=0.0001,seed=0",
    }
    assert {len(row.evaluations) for row in given_up.values()} == {2}  # half of three
    assert all(row and row.status == "complete" for row in quick.finals.values())


def test_a_run_that_ended_before_one_looked_is_rejected_all_the_same(
    bake_off_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("lora", "one", 1e-3, 0)
    settings = spec().settings_of(run)
    found = [{"epoch": its, "step": its, "accuracy": its / 10} for its in (1, 2, 3)]
    metrics = {
        "metric_for_best": "accuracy", "best": found[-1], "before": None, "trainable": 1,
        "evaluations": found, "max_steps": 3,
    }  # fmt: skip
    monkeypatch.setattr(running, "run_apart", lambda *_: RunOutcome("complete", 1.0))
    made = []
    for rival in (0.2, 0.5):
        contents = {"metrics": metrics, "log_history": [], "versions": {}}
        Path(settings.output).mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            Path(settings.output, f"{name}.json").write_text(json.dumps(content))
        rule = RejectSettings(after=0.5, behind=0.1)
        rejecting = Rejecting(rule, "accuracy", [[{"step": 1, "accuracy": rival}]])
        row = Row(run.name, run.parameters, 0, "unfinished", {})
        made.append(
            running.make_run(Job(row, settings, bake_off_folder / "log", rejecting), SweepSignals())
        )
        assert Path(settings.output).exists() is (rival == 0.2)
    lived, rejected = made
    assert (lived.status, lived.value, lived.evaluations) == ("complete", 0.3, found)
    assert (rejected.status, rejected.value, rejected.evaluations) == ("rejected", None, found[:2])
    assert rejected.steps == 3


def test_a_method_of_which_no_rate_came_to_its_end_runs_those_given_up(made_up: MadeUp) -> None:
    both: dict[str, Any] = {"learning_rates": [1e-3, 1e-4], "choose": {"tasks": ["one", "two"]}}
    one, two = (f"{task},lora,learning_rate={{:g}},seed=0" for task in ("one", "two"))
    made_up.diverges = {one.format(1e-3)}  # it is no rival on task one, and is one on task two
    found = prepared(
        methods={"lora": {"method": "lora"}}, reject={"after": 0.5, "behind": 0.05}, **both
    )
    outcome = run_bake_off(found)
    assert made_up.ran.count(two.format(1e-4)) == 2  # given up, then run to its end
    assert rates_of(outcome) == {"lora": 1e-4}
    assert all(row and row.status == "complete" for row in outcome.finals.values())


def test_a_row_that_another_process_wrote_meanwhile_is_kept(made_up: MadeUp) -> None:
    """The other one ended between the look at the folder and the hold of it."""
    late = _Running(prepared(), Console(), None, False)
    run_bake_off(prepared())
    made_up.ran.clear()
    before = rows_in("out")
    late.run()
    assert made_up.ran == []
    assert rows_in("out") == before


def test_what_was_stopped_goes_on_and_repeats_nothing(made_up: MadeUp) -> None:
    made_up.stop_after = 7
    with pytest.raises(Interrupted, match="give the same command again"):
        run_bake_off(prepared())
    so_far = outcome_so_far(prepared())
    assert sum(row.status == "complete" for row in so_far.rows) == 7
    assert NOT_OVER in markdown(so_far, {})
    assert NOT_OVER in page(so_far, {})
    finished = run_bake_off(prepared())
    assert all(row and row.status == "complete" for row in finished.finals.values())
    assert len(set(made_up.ran)) == len(made_up.ran)
    before = list(made_up.ran)
    run_bake_off(prepared())
    assert made_up.ran == before


def test_a_crash_is_recorded_and_the_rest_goes_on(made_up: MadeUp) -> None:
    lost = "two,small,learning_rate=0.001,seed=1"
    made_up.fails = {lost}
    outcome = run_bake_off(prepared())
    rows = {row.name: row for row in outcome.rows}
    assert (rows[lost].status, rows[lost].error) == ("failed", "out of memory")
    complete = [its for its in outcome.finals.values() if its and its.status == "complete"]
    assert len(complete) == 11
    small = next(its for its in standings(outcome) if its.name == "small")
    assert small.missing == {"failed": 1}
    assert small.overall is not None
    assert len(small.overall.values) == 1  # of the seed that has all tasks
    text = markdown(outcome, {})
    assert "out of memory" in text
    assert f"{small.overall.mean:.4f} (1 of 2 seeds)" in text
    made_up.fails = set()
    made_up.ran.clear()
    run_bake_off(prepared())
    assert made_up.ran == []
    run_bake_off(prepared(), retry_failed=True)
    assert made_up.ran == [lost]


def test_what_failed_is_said_in_the_report_and_by_the_exit_code(
    bake_off_folder: Path, made_up: MadeUp
) -> None:
    """All of one method, and then all there are."""
    every = [
        f"one,{name},learning_rate={rate:g},seed=0"
        for name in BEST
        for rate in SPEC["learning_rates"]
    ]
    file = write_config(bake_off_folder / "spec.yaml", SPEC)
    made_up.fails = {*names(every, "small")}
    for flag, code in (("--retry-failed", 1), ("--list", 0), ("--report-only", 0)):
        done = msplora("bake-off", file, flag)
        assert done.code == code
        assert "runs failed; --retry-failed runs them again." in done.out
    assert "runs failed; --retry-failed runs them again." in Path("out/report.md").read_text()
    assert "No run that counts" not in done.out
    made_up.fails = {*every}
    done = msplora("bake-off", file, "--output", "none")
    assert done.code == 1
    assert "No run that counts is complete." in done.out
    made_up.fails = set()
    assert msplora("bake-off", file, "--retry-failed").code == 0


def test_a_full_disk_loses_nothing(made_up: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Rows.put

    def full(rows: Rows, row: Row) -> None:
        if len(made_up.ran) == 3 and row.status == "complete":
            raise OSError(errno.ENOSPC, "No space left on device")
        put(rows, row)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "put", full)
        with pytest.raises(SweepFolderError, match=r"No space left.*give the same command again"):
            run_bake_off(prepared())
    assert [row["status"] for row in rows_in("out")] == ["complete", "complete", "unfinished"]
    outcome = run_bake_off(prepared())
    assert all(row and row.status == "complete" for row in outcome.finals.values())


def test_a_rate_that_fails_is_not_chosen(made_up: MadeUp) -> None:
    made_up.fails = {"one,lora,learning_rate=0.001,seed=0"}
    outcome = run_bake_off(prepared())
    assert rates_of(outcome)["lora"] == 1e-4  # of two alike the lower


def test_methods_tasks_rates_and_seeds_may_be_added(made_up: MadeUp) -> None:
    run_bake_off(prepared())
    made_up.ran.clear()
    more = {**SPEC["methods"], "dora": {"method": "dora"}}
    outcome = run_bake_off(prepared(methods=more, seeds=[0, 1, 2]))
    assert len(names(made_up.ran, "dora")) == len(made_up.ran) - 3 * 2  # a seed of the old three
    assert len(outcome.finals) == 4 * 2 * 3


def test_a_lost_row_is_read_from_its_run(bake_off_folder: Path, made_up: MadeUp) -> None:
    run_bake_off(prepared())
    name = "one,lora,learning_rate=0.001,seed=0"
    settings = write_config(bake_off_folder / "run.yaml", content_of(spec(), name))
    assert msplora("train", settings).code == 0
    kept = [json.dumps(row) for row in rows_in("out") if row["name"] != name]
    Path("out/results.jsonl").write_text("\n".join(kept) + "\n")
    made_up.ran.clear()
    outcome = run_bake_off(prepared())
    assert name not in made_up.ran
    found = next(row for row in outcome.rows if row.name == name)
    metrics = json.loads(Path("out/runs", name, "metrics.json").read_text())
    assert found.value == metrics["best"]["accuracy"]
    assert [its["step"] for its in found.evaluations] == [4, 8, 12]
    assert found.train_seconds is not None


def test_the_report_says_what_the_rows_say(made_up: MadeUp) -> None:
    outcome = run_bake_off(prepared(reject={"after": 0.5, "behind": 0.05}))
    write_report(outcome)
    text = Path("out/report.md").read_text()
    html = Path("out/report.html").read_text()
    for name in BEST:
        values = [
            mean(accuracy(name, BEST[name], task, seed) for task in ("one", "two"))
            for seed in (0, 1)
        ]
        assert f"{mean(values):.4f} ± 0.0071" in text
        assert f"{mean(values):.4f} ± 0.0071" in html
    assert "a run is given up, after 50% of it" in text
    assert "commit: abc (" in text
    assert "Tried: 3 by lora, 4 by pyramid, 3 by small" in text
    assert "With 4 pairs none can be below 0.12, which Holm's correction makes 0.25" in text
    assert NOT_OVER not in text + html
    for name in ("front", "differences", "rates"):
        assert Path(f"out/{name}.svg").read_text().startswith("<?xml")
        assert f"({name}.svg)" in text
    assert html.count("data:image/svg+xml;base64,") == 3
    for outside in ("http://", "https://", "<script", "<link"):
        assert outside not in html


def test_names_from_files_are_escaped(made_up: MadeUp) -> None:
    found = prepared()
    made_up.fails = {"one,lora,learning_rate=0.001,seed=0"}
    outcome = run_bake_off(found)
    row = next(its for its in outcome.rows if its.status == "failed")
    row.error = "<b>not | bold</b>"
    html, text = page(outcome, draw(outcome)), markdown(outcome, {})
    assert "<b>not" not in html
    assert "&lt;b&gt;not | bold" in html
    assert r"&lt;b>not \| bold&lt;/b>" in text


@pytest.mark.parametrize(("gpus", "seen"), [(0.0, ""), (1.0, "3")])
def test_a_run_of_ray_sees_the_gpus_that_it_asked_for(
    monkeypatch: pytest.MonkeyPatch, gpus: float, seen: str
) -> None:
    """Ray itself leaves all of them to a task that asked for none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(engines, "note_origin", lambda *_: None)
    monkeypatch.setattr(engines, "make_run", lambda *_: os.environ["CUDA_VISIBLE_DEVICES"])
    job: Any = SimpleNamespace(row=None, settings=None)
    assert engines._make_run_there(job, 1, gpus) == seen


@pytest.mark.thorough
def test_its_runs_are_those_that_train_makes(bake_off_folder: Path) -> None:
    content = {
        **SPEC,
        "methods": {"lora": {"method": "lora"}},
        "learning_rates": [1e-5, 1e-1],
        "choose": {"tasks": ["one"], "extend": 0},
        "reject": {"after": 0.3, "behind": 0.01},
        "seeds": [0],
    }
    content["tasks"] = {"one": {**SPEC["tasks"]["one"], "training": {"metric_for_best": "loss"}}}
    done = msplora("bake-off", write_config(bake_off_folder / "spec.yaml", content))
    assert done.code == 0, done.err
    rows = {row["name"]: row for row in rows_in("out")}
    best, high = (rows[f"one,lora,learning_rate={rate:g},seed=0"] for rate in (1e-5, 1e-1))
    # Far too high, the loss rises at first, and the run is stopped for real.
    assert (best["status"], high["status"]) == ("complete", "rejected")
    assert len(high["evaluations"]) < 3
    assert not list(Path("out/runs").glob("*learning_rate=0.1*"))
    alone = {**content_of(make_bake_off(content, "spec.yaml"), best["name"]), "output": "alone"}
    assert msplora("train", write_config(bake_off_folder / "alone.yaml", alone)).code == 0
    metrics = json.loads(Path("alone/metrics.json").read_text())
    found = best["value"], best["evaluations"]
    assert found == (metrics["best"]["loss"], metrics["evaluations"])
    assert best["resident_bytes"] > 2**20
    assert f"{best['value']:.4f}" in done.out


def test_what_only_ray_takes_is_refused_without_it(bake_off_folder: Path) -> None:
    done = msplora("bake-off", write_config(bake_off_folder / "spec.yaml", SPEC), "--gpus", "1")
    assert done.code == 2
    assert "--cpus, --gpus: for --ray only" in done.err


def test_without_ray_it_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # an import of it fails now
    expected = r"--ray needs ray.*pip install -e '\.\[ray\]' in msplora"
    with pytest.raises(MSPLoraError, match=expected):
        OnRay("local", 1, 0)._connect()


def test_ray_here_is_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a cluster that happens to run: Ray looks for one where it is given no address."""
    asked = []
    ray = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda address=None, **_: asked.append(address),
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2}}] * 2,
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    OnRay("local", 1, 0)._connect()
    assert asked == ["local"]
    with pytest.raises(
        MSPLoraError, match="to have 3 CPU, and no machine of Ray's has more than 2"
    ):
        OnRay("local", 3, 0)._connect()


@pytest.mark.thorough
def test_ray_makes_the_same_rows(bake_off_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not part of the development environment")
    content = {**SPEC, "learning_rates": [1e-2], "choose": {"tasks": ["one"], "extend": 0}}
    content["methods"] = {"lora": {"method": "lora"}, "pyramid": {"method": "msplora"}}
    file = write_config(bake_off_folder / "spec.yaml", content)
    values: list[dict[str, float]] = []
    for output, flags in (("here", []), ("there", ["--ray", "local", "--cpus", "1"])):
        done = msplora("bake-off", file, "--output", output, *flags)
        assert done.code == 0, done.err
        values.append({row["name"]: row["value"] for row in rows_in(output)})
    assert values[0] == values[1]
    assert len(values[0]) == 8
