"""The folder of a bake-off: its rows, which are its only memory, and the runs they tell of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from msplora.bench.provenance import short
from msplora.sweep.folder import LOGS, RUNS, SweepFolderError, hold
from msplora.sweep.naming import shown
from msplora.sweep.rows import RESULTS, Row, Rows, essence
from msplora.train.absolute_paths import with_absolute_paths
from msplora.train.inputs import data_paths, fingerprint
from msplora.train.run_folder import RunFolder, RunFolderError
from msplora.train.settings import Settings

from .reading import BakeOff, Run

_PLACES = ("model", "tokenizer", "data.path", "data.train", "data.validation", "data.hub")
"""Keys that say where something is: on another machine, the same is in another folder."""


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
        self._check_same()

    def begin(self) -> None:
        """Make the folder, and hold it until this process and its runs' have ended."""
        try:
            for name in (RUNS, LOGS):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SweepFolderError(f"the output {self.path} cannot be made: {error}.") from None
        self.lock = hold(self.path, f"the bake-off in {self.path}")
        self.rows = Rows(self.path)  # another process may have written some until now
        try:
            self._check_same_inputs()
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
            if _is_complete(settings):  # its row was lost
                found.read_run(self.path / RUNS / run.name)
                self.rows.put(found)
        return found

    def _check_same(self) -> None:
        """A row stands for a run only where it was made with the same settings."""
        bake_off = self.bake_off
        for row in self.rows:
            its = row.parameters
            if not {"task", "learning_rate"} <= its.keys():
                raise SweepFolderError(
                    f"the output {self.path} holds a sweep's runs, such as {row.name}, and no "
                    f"bake-off. Name another output."
                )
            if its["method"] not in bake_off.entrants or its["task"] not in bake_off.settings.tasks:
                continue
            now = portable(essence(bake_off.settings_of(Run.of(its))))
            changed = [
                f"{key} was {shown(row.config.get(key))} and is {shown(now.get(key))}"
                for key in sorted(row.config.keys() | now.keys())
                if row.config.get(key) != now.get(key)
            ]
            if changed:
                raise SweepFolderError(
                    f"the bake-off in {self.path} had another {its['method']} on {its['task']}: "
                    f"{'; '.join(changed)}. Its runs cannot be compared with new ones: name "
                    f"another output, or give what is new a name of its own."
                )

    def _check_same_inputs(self) -> None:
        """Refuse to add to results of other data: all of a task are compared with each other.

        What is not on this machine, or was not recorded, cannot be compared.
        """
        bake_off = self.bake_off
        now: dict[str, dict[str, int]] = {}
        for row in self.rows:
            entrant, task = row.parameters["method"], row.parameters["task"]
            known = entrant in bake_off.entrants and task in bake_off.settings.tasks
            if not known or row.inputs is None or row.status in ("failed", "unfinished"):
                continue
            settings = bake_off.settings_of(Run.of(row.parameters))
            settings = with_absolute_paths(settings, must_exist=False)
            which = repr((settings.data, settings.init_from))
            if which not in now:
                now[which] = fingerprint(settings)
            if any(now[which].get(what, its) != its for what, its in row.inputs.items()):
                raise SweepFolderError(
                    f"the bake-off in {self.path} has runs of {task} that were made with other "
                    f"content of {', '.join(data_paths(settings))}. They cannot be compared with "
                    f"new ones: put the old content back, or name another output."
                )


def _is_complete(settings: Settings) -> bool:
    try:
        return RunFolder(with_absolute_paths(settings), "auto").is_complete
    except RunFolderError:
        return False  # the run will say so itself, and it alone fails


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings without the folders of this machine."""
    return {
        key: _without_folders(value) if key in _PLACES else value for key, value in config.items()
    }


def _without_folders(value: Any) -> Any:
    if isinstance(value, str):
        return short(value)
    if isinstance(value, list):
        return [_without_folders(its) for its in value]
    if isinstance(value, dict):
        return {key: _without_folders(its) for key, its in value.items()}
    return value
