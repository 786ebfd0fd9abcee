"""One run of a bake-off: made by `msplora train` in a process of its own, and its row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from msplora.sweep.rows import Row
from msplora.sweep.running import SweepSignals, run_apart
from msplora.train.checkpoints import remove
from msplora.train.interrupted import goes_on
from msplora.train.settings import Settings

from .rejecting import Evaluations, Rejecting, evaluations_so_far


@dataclass(frozen=True)
class Job:
    """What a machine needs to know to make a run."""

    row: Row
    settings: Settings
    """With absolute paths: another machine's processes are at work in another folder."""
    log: Path
    """Where what the run prints is kept."""
    rejecting: Rejecting | None
    """When to give it up; None for a run that counts."""


def make_run(job: Job, stop: SweepSignals, lock: int | None = None) -> Row:
    """Train, and return the row with what came of it; a crash is recorded there too.

    `lock` is the descriptor that holds the folder, if this process has it.
    """
    output = Path(job.settings.output)
    working = output.with_name(f"{output.name}.unfinished")

    row = job.row
    is_resumed = goes_on(job.settings)
    given_up: Evaluations = []

    def is_hopeless() -> bool:
        nonlocal given_up
        assert job.rejecting
        evaluations, row.steps = evaluations_so_far(working)
        given_up = job.rejecting.until_hopeless(evaluations, row.steps)
        return bool(given_up)

    outcome = run_apart(job.settings, job.log, stop, lock, is_hopeless if job.rejecting else None)
    row.status, row.error = outcome.status, outcome.error
    row.seconds += outcome.seconds
    row.resident_bytes = max(row.resident_bytes or 0, outcome.resident_bytes or 0) or None
    if outcome.status == "complete":
        whole = replace(row)
        whole.read_run(output)
        if is_resumed:
            whole.train_seconds = None  # it would be that of the last attempt
        if job.rejecting and not given_up:  # it may have been quicker than the looks at it
            given_up = job.rejecting.until_hopeless(whole.evaluations, whole.steps or 0)
        row = whole if not given_up else replace(row, status="rejected", steps=whole.steps)
    if row.status == "rejected":
        row.evaluations = list(given_up)
    if row.status in ("rejected", "diverged"):
        # What they left is of no use; half deleted under its name it would stand in a run's way.
        for folder in (working, output):
            if folder.is_dir():
                remove(folder)
    return row
