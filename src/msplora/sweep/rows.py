"""The results of a sweep: one row per run in results.jsonl, which is the sweep's only memory.

A run is known by its config, not by its name: so a sweep whose file was changed finds again what it
has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from msplora.errors import MSPLoraError
from msplora.train.absolute_paths import PATHS, absolute_value
from msplora.train.checkpoints import write_whole
from msplora.train.run_folder import HISTORY, METRICS
from msplora.train.same_settings import EVAL_BATCH_SIZE, flat, free_to_change
from msplora.train.settings import Settings

RESULTS = "results.jsonl"
Status = Literal["complete", "diverged", "failed", "rejected", "unfinished"]

_IN_ORDER = ("unfinished", "failed", "rejected", "diverged", "complete")


@dataclass
class Row:
    """One run: what it was, and what came of it."""

    name: str
    """Of its folder below `runs`."""
    parameters: dict[str, Any]
    seed: int | None
    status: Status
    config: dict[str, Any]
    """What `essence` leaves of its settings."""
    metric: str | None = None
    value: float | None = None
    """Of the checkpoint that was kept, on the held-out rows."""
    best: dict[str, Any] = field(default_factory=dict)
    """All metrics of that checkpoint, with its step and epoch."""
    before: dict[str, Any] | None = None
    """The metrics before the first step."""
    scored_on: dict[str, int | None] | None = None
    """What all metrics are of, as `ScoredOn` has it; None where an older msplora made the run."""
    trainable: int | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """The metrics at each evaluation, in order."""
    steps: int | None = None
    """How many it was to have in all."""
    seconds: float = 0.0
    """Wall time, loading included, over all attempts."""
    train_seconds: float | None = None
    """Of training alone, evaluations included, as the trainer measured it; None if resumed."""
    gpu_bytes: int | None = None
    """The most memory of a GPU that its tensors took at once; None on a CPU."""
    resident_bytes: int | None = None
    """The most memory that the run's process had at once, without the GPU's; None if not apart.
    As the system counts it: no less than the process that started it had by then.
    """
    error: str | None = None
    inputs: dict[str, int] | None = None
    """The fingerprint of the files that it reads; None where an older msplora began it."""
    files: dict[str, dict[str, int]] | None = None
    """Of a bake-off, in its place: key -> file -> checksum; None where that was not recorded."""
    kept: bool = True
    """Whether its folder was left; not so with `keep: best` for the others."""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    hardware: str | None = None
    earlier: list[dict[str, Any]] = field(default_factory=list)
    """The commit, hardware and versions of earlier starts, of a run that went on under others."""

    @classmethod
    def started(
        cls, name: str, parameters: dict[str, Any], seed: int | None, settings: Settings
    ) -> Row:
        """The row of a run that begins."""
        return cls(name, parameters, seed, "unfinished", essence(settings))

    def read_run(self, folder: Path) -> None:
        """Take over what a complete run's folder says."""
        metrics = _read_json(folder / METRICS)
        self.status, self.error, self.kept = "complete", None, True
        self.metric, self.best = metrics["metric_for_best"], metrics["best"]
        if self.metric is None:
            self.status, self.error = (
                "failed",
                "it held out no rows, so there is nothing to compare",
            )
        else:
            self.value = self.best[self.metric]
        self.before, self.trainable = metrics["before"], metrics["trainable"]
        self.scored_on = metrics.get("scored_on")
        self.evaluations, self.gpu_bytes = metrics["evaluations"], metrics.get("gpu_bytes")
        self.steps = metrics.get("max_steps")
        times = [its.get("train_runtime") for its in _read_json(folder / HISTORY)]
        self.train_seconds = next(filter(None, times), None)
        self.versions = _read_json(folder / "versions.json")


class Rows:
    """The rows of a sweep's folder, in the order in which the runs were first started.

    Raises:
        MSPLoraError: the file is not what a sweep wrote, or has two results of one run.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / RESULTS
        self._rows: dict[str, Row] = {}
        self._absolute: dict[str, dict[str, Any]] = {}
        if self.file.is_file():
            try:
                lines = self.file.read_text(encoding="utf-8").splitlines()
                found = [Row(**json.loads(line)) for line in lines]
            except (ValueError, TypeError) as error:
                raise MSPLoraError(
                    f"{self.file} is not what a sweep wrote: {error}. Restore it, or move it away: "
                    f"complete runs are then found again by their folders."
                ) from None
            for row in found:
                self._rows[row.name] = self._better(self._rows.get(row.name), row)

    def _better(self, before: Row | None, row: Row) -> Row:
        """Of two rows of one name, as where two files were joined, the one that came furthest."""
        if before is None:
            return row
        if before.status == row.status == "complete" and before.value != row.value:
            raise MSPLoraError(
                f"{self.file} has two complete rows of {row.name}, with {before.metric} "
                f"{before.value} and {row.value}. A run has one result: restore the file as it was "
                f"(from git, if it is kept there), or delete the row that is not to count."
            )
        return before if _came_so_far(row) < _came_so_far(before) else row

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def get(self, name: str) -> Row | None:
        """The row of this name."""
        return self._rows.get(name)

    def find(self, settings: Settings) -> Row | None:
        """The row of a run with these settings."""
        wanted = essence(settings)
        return next((row for row in self if self._config(row) == wanted), None)

    def _config(self, row: Row) -> dict[str, Any]:
        """A row's config with absolute paths, which older msploras left as they stood."""
        if row.name not in self._absolute:
            paths = {
                key: absolute_value(key, its) for key, its in row.config.items() if key in PATHS
            }
            self._absolute[row.name] = row.config | paths
        return self._absolute[row.name]

    def put(self, row: Row) -> None:
        """Add a row, or replace the one of its name, and write the file."""
        self._rows[row.name] = row
        lines = [json.dumps(asdict(its), allow_nan=False) for its in self]
        write_whole(self.file, "\n".join(lines) + "\n")


def _came_so_far(row: Row) -> int:
    return _IN_ORDER.index(row.status)


def essence(settings: Settings) -> dict[str, Any]:
    """What decides a run's result: dotted key -> value, of all that is not the default.

    Defaults are left out so that a later version with further keys finds the same run.
    """
    found = flat(settings.model_dump(mode="json", exclude_defaults=True))
    free = free_to_change(settings.method)
    if settings.training.eval_batch_size == settings.training.batch_size:
        free |= {EVAL_BATCH_SIZE}  # its default, which is another key's
    return {key: value for key, value in found.items() if key not in free}


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
