"""One run of a bake-off: made by `msplora train` in a process of its own, and its row."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from msplora.bench.provenance import commit, hardware
from msplora.sweep.rows import Row
from msplora.sweep.running import SweepSignals, run_apart
from msplora.train.run import with_absolute_paths
from msplora.train.settings import Settings

from .rejecting import Rejecting, evaluations_so_far


@dataclass(frozen=True)
class Job:
    """What a machine needs to know to make a run."""

    row: Row
    settings: Settings
    log: Path
    """Where what the run prints is kept."""
    rejecting: Rejecting | None
    """When to give it up; None for a run that counts."""


def make_run(job: Job, stop: SweepSignals, lock: int | None = None) -> Row:
    """Train, and return the row with what came of it; a crash is recorded there too.

    `lock` is the descriptor that holds the folder, if this process has it.
    """
    settings = with_absolute_paths(job.settings)
    output = Path(settings.output)
    working = output.with_name(f"{output.name}.unfinished")

    def is_hopeless() -> bool:
        assert job.rejecting
        evaluations, steps = evaluations_so_far(working)
        return bool(steps) and job.rejecting.is_hopeless(evaluations, steps)

    row = job.row
    outcome = run_apart(settings, job.log, stop, lock, is_hopeless if job.rejecting else None)
    row.status, row.error = outcome.status, outcome.error
    row.seconds += outcome.seconds
    row.resident_bytes = max(row.resident_bytes or 0, outcome.resident_bytes or 0) or None
    row.commit, row.hardware = commit(), hardware()
    if outcome.status == "complete":
        row.read_run(output)
    if outcome.status == "rejected":
        row.evaluations, _ = evaluations_so_far(working)
    if outcome.status in ("rejected", "diverged"):
        # Its checkpoints are of no use.
        shutil.rmtree(working, ignore_errors=True)
    return row
