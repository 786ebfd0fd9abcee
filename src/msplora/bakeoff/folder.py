"""The folder of a bake-off: its rows, which are its only memory, and the runs they tell of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msplora.bench.provenance import short
from msplora.sweep.folder import LOGS, RUNS, SweepFolderError, hold
from msplora.sweep.naming import shown
from msplora.sweep.rows import RESULTS, Row, Rows, essence
from msplora.train.absolute_paths import with_absolute_paths
from msplora.train.checkpoints import clear
from msplora.train.interrupted import goes_on
from msplora.train.run_folder import RunFolder, RunFolderError
from msplora.train.settings import Settings

from .inputs import Inputs, compare, inputs_of
from .reading import BakeOff, Run

_PLACES = (
    "model", "tokenizer", "data.path", "data.train", "data.validation", "data.hub",
    "data.chat_template", "init_from",
)  # fmt: skip
"""Keys that say where something is: on another machine, the same is in another folder."""
HAVE_RESULTS = ("complete", "rejected", "diverged")
"""What a run has come to if the data it read is to stay what it was."""


class BakeOffFolder:
    """Making one reads the rows and checks that they are this bake-off's; it touches nothing."""

    def __init__(self, bake_off: BakeOff) -> None:
        self.bake_off = bake_off
        self.path = bake_off.output
        self.lock: int | None = None
        if self.path.is_file():
            raise SweepFolderError(f"the output {self.path} is a file; name a folder.")
        known = (RESULTS, RUNS)
        taken = self.path.is_dir() and any(self.path.iterdir())
        if taken and not any((self.path / name).exists() for name in known):
            raise SweepFolderError(
                f"the output folder {self.path} is not empty and holds no bake-off. Name another."
            )
        self.rows = Rows(self.path)
        self._inputs = {
            (name, task): inputs_of(bake_off.settings_of(Run(name, task, its.rates[0], 0)))
            for name, its in bake_off.entrants.items()
            for task in bake_off.settings.tasks
        }
        self._check_same()

    def begin(self) -> None:
        """Make the folder, and hold it until this process and its runs' have ended."""
        try:
            for name in (RUNS, LOGS):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SweepFolderError(f"the output {self.path} cannot be made: {error}.") from None
        self.lock = hold(self.path, f"the bake-off in {self.path}")
        clear(self.path / RUNS)  # what a kill left of runs that were being removed
        self.rows = Rows(self.path)  # another process may have written some until now
        try:
            self._check_same()
        except SweepFolderError:
            self.release()
            raise

    def release(self) -> None:
        """Let others at it."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def row(self, run: Run) -> Row:
        """The row of a run; where there is none, of a run that begins, or that was found whole."""
        found = self.rows.get(run.name)
        if found is None:
            settings = self.bake_off.settings_of(run)
            found = Row(
                run.name, run.parameters, run.seed, "unfinished", portable(essence(settings))
            )
            if _is_complete(settings):  # its row was lost, and with it what it had read
                found.read_run(self.path / RUNS / run.name)
                self.rows.put(found)
        return found

    def inputs(self, run: Run) -> Inputs:
        """What a run that begins now reads.

        Raises:
            SweepFolderError: it has changed since this folder was made.
        """
        found = inputs_of(self.bake_off.settings_of(run))
        before = self._inputs[run.entrant, run.task]
        self._refuse_others(run, "this was started", before, found)
        return found

    def _check_same(self) -> None:
        """A row stands for a run only where it was made with the same settings, of the same."""
        bake_off, others = self.bake_off, []
        for row in self.rows:
            its = row.parameters
            if not {"task", "learning_rate"} <= its.keys():
                raise SweepFolderError(
                    f"the output {self.path} holds a sweep's runs, such as {row.name}, and no "
                    f"bake-off. Name another output."
                )
            if its["method"] not in bake_off.entrants or its["task"] not in bake_off.settings.tasks:
                others.append(row.name)
                continue
            run = Run.of(its)
            inputs = self._inputs[run.entrant, run.task]
            settings = bake_off.settings_of(run)
            if row.status in HAVE_RESULTS or (row.status == "unfinished" and goes_on(settings)):
                self._refuse_others(run, f"{row.name} ran", row.files or {}, inputs)
            now = portable(essence(settings))
            changed = [
                f"{key} was {shown(row.config.get(key))} and is {shown(now.get(key))}"
                for key in sorted(row.config.keys() | now.keys())
                if not _is_same(key, row, now, inputs)
            ]
            if changed:
                raise SweepFolderError(
                    f"the bake-off in {self.path} had another {its['method']} on {its['task']}: "
                    f"{'; '.join(changed)}. Its runs cannot be compared with new ones: name "
                    f"another output, or give what is new a name of its own."
                )
        if others and len(others) == len(list(self.rows)):
            raise SweepFolderError(
                f"the output {self.path} holds another bake-off: none of its {len(others)} runs, "
                f"such as {others[0]}, is of a method and a task that {bake_off.source} names. "
                f"Name another output, or the methods and tasks as they were."
            )

    def _refuse_others(self, run: Run, when: str, before: Inputs, now: Inputs) -> None:
        others = [
            f"{', '.join(files[:3])}{' …' if len(files) > 3 else ''} of {key}"
            for key, files in compare(before, now).items()
            if files
        ]
        if others:
            raise SweepFolderError(
                f"task {run.task} of the bake-off in {self.path} is not what it was: "
                f"{', '.join(others)} had other content when {when}. What was run cannot be "
                f"compared with new runs: put the old content back, name another output, or give "
                f"what is new a name of its own."
            )


def _is_complete(settings: Settings) -> bool:
    try:
        return RunFolder(with_absolute_paths(settings), "auto").is_complete
    except RunFolderError:
        return False  # the run will say so itself, and it alone fails


def _is_same(key: str, row: Row, now: Mapping[str, Any], inputs: Inputs) -> bool:
    """Whether a setting is what a row has; where something lies is not compared if it could be."""
    before, value = row.config.get(key), now.get(key)
    if before == value or key not in _PLACES:
        return before == value
    if key in compare(row.files or {}, inputs):
        return _relocated(before, lambda _: "") == _relocated(value, lambda _: "")
    return row.files is None and _ends_alike(before, value)  # an earlier version's row


def _ends_alike(one: Any, other: Any) -> bool:
    """Whether two places agree as far as both name folders."""
    if isinstance(one, str) and isinstance(other, str):
        parts, others = Path(one).parts, Path(other).parts
        depth = min(len(parts), len(others))
        return parts[-depth:] == others[-depth:]
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_ends_alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return all(_ends_alike(its, other[key]) for key, its in one.items())
    return one == other


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings without the folders of this machine."""
    return {
        key: _relocated(value, short) if key in _PLACES else value for key, value in config.items()
    }


def _relocated(value: Any, path: Callable[[str], str]) -> Any:
    """A place, or a list of sources, with every path replaced."""
    if isinstance(value, str):
        return path(value)
    if isinstance(value, list):
        return [_relocated(its, path) for its in value]
    if isinstance(value, dict) and "path" in value:
        return {**value, "path": path(value["path"])}
    return value
