"""What a bake-off keeps of runs that were stopped, killed or half removed, and how it goes on."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from bake_offs import BEST, SPEC, MadeUp, content_of, names, prepared, rates_of, rows_in, spec
from msplora.bakeoff import begun_on, running
from msplora.bakeoff.bake_off import outcome_so_far, run_bake_off
from msplora.bakeoff.begun_on import note_origin
from msplora.bakeoff.engines import OnRay
from msplora.bakeoff.folder import BakeOffFolder
from msplora.bakeoff.reading import Run
from msplora.bakeoff.report import NOT_OVER, markdown
from msplora.bakeoff.running import Job
from msplora.sweep.rows import Row
from msplora.sweep.running import Outcome as RunOutcome
from msplora.sweep.running import SweepSignals
from msplora.train.run_folder import RunFolder
from msplora.train.settings import Settings
from msplora.train.settings_file import make_settings
from msplora.train.stopping import Interrupted
from runs import msplora, write_config

LOST = "one,lora,learning_rate=0.001,seed=0"


def made_up_settings(output: str = "run") -> Settings:
    return make_settings({**content_of(spec(), LOST), "output": output}, "a test")


def test_a_stopped_run_says_what_it_was_made_on_and_names_no_folder(made_up: MadeUp) -> None:
    made_up.stop_after = 2
    with pytest.raises(Interrupted):
        run_bake_off(prepared())
    (row,) = [its for its in rows_in("out") if its["status"] == "unfinished"]
    assert (row["error"], row["commit"], row["hardware"]) == (None, "abc", "a machine")


def test_a_run_that_was_killed_is_told_of_and_made_at_the_next_start(
    made_up: MadeUp, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up.is_killed = {LOST}
    outcome = run_bake_off(prepared())
    assert made_up.ran.count(LOST) == 1  # not for ever, should memory be what it wants
    told = capsys.readouterr().out
    assert f"{LOST}: unfinished: its process was ended by SIGKILL" in told
    assert "lora: not all of its learning rates came to an end" in told
    (row,) = [its for its in rows_in("out") if its["name"] == LOST]
    assert (row["status"], row["error"]) == ("unfinished", None)
    # The best of the other rates is not run to its end on all tasks and seeds.
    assert names(made_up.ran, "lora", "seed=1") == names(made_up.ran, "lora", "two") == []
    assert len(names(made_up.ran, "small", "two")) == 2
    assert not outcome.is_over
    made_up.is_killed = set()
    outcome = run_bake_off(prepared())
    assert outcome.is_over
    assert rates_of(outcome) == BEST
    assert made_up.ran.count(LOST) == 2


def test_a_rate_beyond_that_was_killed_is_waited_for(made_up: MadeUp) -> None:
    beyond = "one,pyramid,learning_rate=0.1,seed=0"
    made_up.is_killed = {beyond}
    outcome = run_bake_off(prepared())
    assert made_up.ran.count(beyond) == 1
    assert names(made_up.ran, "pyramid", "two") == []
    assert not outcome.is_over
    assert "0.1" in markdown(outcome, {})


def test_a_rejected_run_that_was_half_removed_stands_in_no_ones_way(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = made_up_settings(str(tmp_path / "out/runs/one"))
    working = tmp_path / "out/runs/one.unfinished"
    (working / "checkpoints/checkpoint-3").mkdir(parents=True)
    (working / "config.yaml").write_text("a run")
    deleted = []

    def is_killed(folder: Path, **_: Any) -> None:
        if folder.exists():
            (folder / "config.yaml").unlink()
            deleted.append(folder)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", is_killed)
        patch.setattr(running, "run_apart", lambda *_: RunOutcome("diverged", 1.0))
        row = Row(LOST, {}, 0, "unfinished", {})
        with pytest.raises(KeyboardInterrupt):
            running.make_run(Job(row, settings, tmp_path / "log", None), SweepSignals())
    (left,) = deleted
    assert left.exists()
    RunFolder(settings, "auto")  # does not take what is left for a run of somebody
    folder = BakeOffFolder(prepared().bake_off)
    folder.begin()
    folder.release()
    assert not left.exists()


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commits that are found, one after the other."""
    found = ["first", "second", "third"]
    monkeypatch.setattr(begun_on, "commit", lambda: found.pop(0))
    return found


def test_a_run_that_goes_on_keeps_what_it_was_begun_on(commits: list[str], tmp_path: Path) -> None:
    settings = made_up_settings(str(tmp_path / "run"))
    row = Row(LOST, {}, 0, "unfinished", {})
    note_origin(row, settings)
    assert (row.commit, row.earlier) == ("first", [])
    checkpoint = tmp_path / "run.unfinished/checkpoints/checkpoint-3"
    checkpoint.mkdir(parents=True)
    note_origin(row, settings)
    assert row.commit == "second"
    assert [its["commit"] for its in row.earlier] == ["first"]
    checkpoint.rmdir()  # it starts anew
    note_origin(row, settings)
    assert (row.commit, row.earlier) == ("third", [])


@pytest.mark.parametrize("place", ["run", "run.unfinished"])
def test_a_run_that_is_whole_stays_what_it_was_made_on(
    commits: list[str], tmp_path: Path, place: str
) -> None:
    """It was killed after its end, before its row said so."""
    (tmp_path / place).mkdir()
    (tmp_path / place / "run.json").write_text("{}")
    row = Row(LOST, {}, 0, "unfinished", {}, commit="before")
    note_origin(row, made_up_settings(str(tmp_path / "run")))
    assert (row.commit, row.earlier) == ("before", [])
    assert len(commits) == 3


class FakeRay:
    """Runs nothing: its tasks are lost with their machine, or wait until somebody stops it."""

    def __init__(self, lost: int) -> None:
        self.lost, self.sent, self.cancelled = lost, [], []
        self.exceptions = SimpleNamespace(
            RayError=RuntimeError, RayTaskError=type("RayTaskError", (RuntimeError,), {})
        )

    def is_initialized(self) -> bool:
        return True

    def remote(self, **_: Any) -> Any:
        return lambda _: SimpleNamespace(remote=self._send)

    def _send(self, job: Job, *_: Any) -> str:
        self.sent.append(job.row.name)
        return job.row.name

    def wait(self, tasks: list[str], **_: Any) -> tuple[list[str], list[str]]:
        if not self.lost and not self.cancelled:
            raise KeyboardInterrupt
        self.lost -= 1
        return tasks[:1], tasks[1:]

    def get(self, task: str) -> Row:
        raise RuntimeError(f"the machine of {task} is gone.")

    def cancel(self, task: str) -> None:
        self.cancelled.append(task)


def test_a_run_that_waits_for_its_turn_has_no_row(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay(lost=1)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(Interrupted):
        run_bake_off(prepared(), Console(), OnRay("local", 1, 0))
    assert len(ray.sent) == 4  # the first rate of each method, and the next one of the lost one
    (row,) = rows_in("out")  # of the run that was lost with its machine
    assert (row["name"], row["status"], row["error"]) == (ray.sent[0], "unfinished", None)
    assert len(ray.cancelled) == 3


def test_the_report_of_a_stopped_bake_off_is_written(
    bake_off_folder: Path, made_up: MadeUp
) -> None:
    made_up.stop_after = 2
    done = msplora("bake-off", write_config(bake_off_folder / "spec.yaml", SPEC))
    assert done.code == 128 + signal.SIGINT
    assert NOT_OVER in Path("out/report.md").read_text()


def test_a_rate_that_has_only_begun_is_shown(made_up: MadeUp) -> None:
    """On two tasks; the second was not begun."""
    both: dict[str, Any] = {"choose": {"tasks": ["one", "two"]}}
    made_up.stop_after = 2
    with pytest.raises(Interrupted):
        run_bake_off(prepared(**both))
    text = markdown(outcome_so_far(prepared(**both)), {})
    assert "| lora | 0.001 | one 0.9000 | not on all yet |" in text
    assert "| lora | 0.01 | one 0.8000 | not on all yet |" in text
    assert "| lora | 0.0001 | one unfinished | not on all yet |" in text


def test_rows_without_the_later_fields_are_read(made_up: MadeUp) -> None:
    run_bake_off(prepared())
    rows = rows_in("out")
    for row in rows:
        del row["earlier"]
    Path("out/results.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run = Run("lora", "one", 1e-3, 0)
    row = outcome_so_far(prepared()).finals[run]
    assert row is not None
    assert row.earlier == []
