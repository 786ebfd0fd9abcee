"""The folder of a run: whole or not there. Work goes on beside it, and is renamed at the end.

Each change of state is one rename, so that a process may be killed between any two: a folder
`<output>.unfinished` with `checkpoints` in it is to be resumed, one without is complete but for its
name.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from msplora.analysis.history import RECORD
from msplora.errors import MSPLoraError
from msplora.folder_mark import not_written, read_mark, some, write_mark
from msplora.folders import (
    cannot_be_renamed,
    check_apart,
    clear_after_a_kill,
    put_in_place,
)

from . import inputs
from .checkpoints import Found, clear, find_newest, remove, sync, write_whole
from .devices import world_size
from .interrupted import NOT_RESUMED
from .same_settings import can_start_from, differences, free_to_change
from .settings import Settings
from .settings_file import read_settings, write_settings

CONFIG = "config.yaml"
METRICS = "metrics.json"
HISTORY = "log_history.json"
DATA = "data.json"
BEFORE = "checkpoints/before.json"
"""What was measured before the first step, kept for a run that is resumed."""
INPUTS = "checkpoints/inputs.json"
"""The checksums of the files that the run began with."""
REPLACES = "checkpoints/replaces.json"
"""The checksum of the complete run that stood in the output when this one began, if one did."""
RUN = "run.json"
"""The mark of a complete run: the checksums of what it read and of what it wrote."""

_WRITTEN = frozenset(
    {
        *(CONFIG, METRICS, HISTORY, DATA, RUN, RECORD, "checkpoints", "tensorboard"),
        *("adapter", "model", "versions.json", "plan.json", "plan.txt", "loss.png", "README.md"),
    }
)
"""All that a run writes in its folder."""

Resume = bool | Literal["auto"]
"""Whether to resume: False starts, True needs an unfinished run, "auto" does what is left to do."""


class RunFolderError(MSPLoraError):
    """The output folder is taken, or holds nothing to resume."""


class RunFolder:
    """Where a run is written: in `<output>.unfinished` until it is complete, then in `<output>`.

    Making one checks that the run may be written there, and touches nothing.
    """

    def __init__(self, settings: Settings, resume: Resume = False, force: bool = False) -> None:
        self.settings = settings
        self.path = Path(settings.output).expanduser().resolve()
        if not self.path.name:
            raise RunFolderError(f"the output {settings.output!r} is no folder of a run; name one.")
        self.working = self.path.with_name(self.path.name + ".unfinished")
        self.found = Found()
        self._force = force
        self._locks: list[int] = []
        if resume not in (True, False, "auto"):
            raise RunFolderError(f"resume is True, False or 'auto', not {resume!r}.")
        if resume and force:
            raise RunFolderError("--resume continues a run and --force discards it; give one.")
        if self.path.is_file():
            raise RunFolderError(f"the output {self.path} is a file; name a folder.")
        self._check_writable()
        if settings.init_from:
            start = Path(settings.init_from)
            for folder in (self.path, self.working):
                check_apart(folder, (start, start / "adapter"))
        unfinished = (self.working / CONFIG).is_file()
        self.is_complete = resume == "auto" and not unfinished and (self.path / RUN).is_file()
        """Whether there is nothing left to do."""
        self.resumes = unfinished if resume == "auto" else bool(resume)
        if not self.is_complete:
            self._check_replaceable()
        if self.is_complete:
            self._check_same_settings(self.path)
            self._check_same_data(self.path, (read_mark(self.path, RUN) or {}).get("inputs"))
        elif self.resumes:
            self._check_resumable()
        else:
            self._check_may_begin()

    @property
    def checkpoints(self) -> Path:
        """Where the trainer saves while it trains."""
        return self.working / "checkpoints"

    @property
    def lacks_only_its_name(self) -> bool:
        """Whether the unfinished run was killed when all that was left was to rename it."""
        return (self.working / RUN).is_file() and not self.checkpoints.exists()

    @property
    def go_on(self) -> str:
        """The command that continues the run, and by what launcher where the settings have none."""
        command = f"msplora train {shlex.quote(str(self.working / CONFIG))} --resume"
        if world_size() > 1 and self.settings.devices.processes == 1:
            return f"with the launcher it was started with, {world_size()} processes: {command}"
        return command

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole, of a run that is resumed."""
        return self.found.newest.path if self.found.newest else None

    def begin(self) -> list[str]:
        """Make the working folder, or take up the one to resume; return what there is to say."""
        if self.working.exists():
            self._lock(self.working)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        clear_after_a_kill(self.path)
        clear_after_a_kill(self.working)
        if self.resumes:
            return self._take_up()
        if self.lacks_only_its_name:
            self._take_its_name()  # rather than discard what --force was once told to make
        self._check_may_begin()  # of what a killed process had moved aside, too
        new = Path(tempfile.mkdtemp(prefix=f".{self.working.name}.partial-", dir=self.path.parent))
        self._lock(new)
        new.chmod(0o755)  # mkdtemp's folders are private
        (new / self.checkpoints.name).mkdir()
        write_settings(self.settings, new / CONFIG)
        write_whole(new / INPUTS, json.dumps(inputs.checksums(self.settings), indent=2) + "\n")
        write_whole(new / REPLACES, json.dumps(self._run_there()) + "\n")
        sync(new)
        put_in_place(new, self.working)
        return []

    def write_json(self, name: str, content: Mapping[str, Any] | list[Any]) -> None:
        """Write a JSON file of the run."""
        write_whole(self.working / name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def finish(self) -> Path:
        """Drop the checkpoints and give the folder its name; return where the run now is."""
        if not self.lacks_only_its_name:
            facts = {"inputs": self._inputs(), "replaces": self._replaces()}
            write_mark(self.working, RUN, facts, leave_out=[self.checkpoints.name])
        sync(self.working)
        self._take_its_name()
        self.release()
        return self.path

    def clear(self) -> None:
        """Remove what a process left that was killed after the run was complete."""
        clear_after_a_kill(self.path)

    def release(self) -> None:
        """Let other processes work on the run again."""
        while self._locks:
            os.close(self._locks.pop())

    def _take_its_name(self) -> None:
        clear_after_a_kill(self.path)
        if self.checkpoints.exists():
            away = tempfile.mkdtemp(prefix=f".{self.path.name}.old-", dir=self.path.parent)
            self.checkpoints.rename(Path(away) / self.checkpoints.name)
        foreign = self._foreign(self.path)
        if foreign:
            raise RunFolderError(
                f"{self.path} holds {foreign}, which no run wrote, so the new run was not put in "
                f"its place. It is complete, in {self.working}: move what is yours away, and then "
                f"{self.go_on}"
            )
        if self._is_another_there():
            raise RunFolderError(
                f"another run was put into {self.path} while this one trained, and is left there. "
                f"This one is complete, in {self.working}: move the other away, and then "
                f"{self.go_on}"
            )
        put_in_place(self.working, self.path)
        clear_after_a_kill(self.path)

    def _run_there(self) -> str | None:
        """The checksum of the complete run in the output, which tells it from every other."""
        mark = self.path / RUN
        return hashlib.sha256(mark.read_bytes()).hexdigest() if mark.is_file() else None

    def _is_another_there(self) -> bool:
        """Whether a run came into the output since this one began."""
        return self._run_there() not in (None, self._replaces())

    def _replaces(self) -> str | None:
        """The checksum of the run that this one was told to replace."""
        record = self.working / REPLACES
        if record.is_file():
            return json.loads(record.read_text(encoding="utf-8"))
        return (read_mark(self.working, RUN) or {}).get("replaces")

    def _take_up(self) -> list[str]:
        self.checkpoints.mkdir(exist_ok=True)
        clear(self.checkpoints)
        notes = []
        for path, fault in self.found.damaged.items():
            remove(path)
            notes.append(f"skipped {path.name}: {fault}")
        newest = self.found.newest
        if self.settings.init_from and not inputs.knows_start(self._inputs(), self.settings):
            notes.append(
                f"began with an msplora that kept no checksum of {self.settings.init_from}: "
                f"whether it is still the same cannot be told"
            )
        if newest:
            notes.append(f"goes on after step {newest.step}, from {newest.path}")
        elif self.found.damaged:
            notes.append("no checkpoint is whole: starts again from the beginning")
        # What may be changed has to stand in the file, for the next time.
        beside = self.working / f".{CONFIG}.partial"
        write_settings(self.settings, beside)
        beside.replace(self.working / CONFIG)
        return notes

    def _lock(self, folder: Path) -> None:
        """Hold the folder until this process ends, however it ends, under any name it is given."""
        self._locks.append(os.open(folder, os.O_RDONLY))
        try:
            fcntl.flock(self._locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise RunFolderError(
                f"another process is at work on the run in {self.working}. Wait for it, or stop it."
            ) from None
        except OSError:
            pass  # some network file systems have no locks: then it is the user's to take care

    def _check_writable(self) -> None:
        parent = self.path.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise RunFolderError(
                f"the output {self.path} cannot be made: {parent} is no folder "
                f"that can be written to."
            )

    def _check_replaceable(self) -> None:
        """A run takes its name when it is complete, which must not fail then."""
        why = cannot_be_renamed(self.path) if self.path.is_dir() else None
        if why:
            raise RunFolderError(
                f"the output {self.path} {why}, so a run cannot be put in its place. Name a folder "
                f"in it, such as {self.path / 'run'}."
            )

    def _check_may_begin(self) -> None:
        if self._force:
            self._check_discardable()
        else:
            self._check_free()

    def _check_discardable(self) -> None:
        """Of what --force would delete: it must be what a run left, and nothing else."""
        for folder, mark in ((self.path, RUN), (self.working, CONFIG)):
            if _holds_something(folder) and not (folder / mark).is_file():
                raise RunFolderError(
                    f"{folder} holds files but no {mark}, so it is not a run, and --force "
                    f"does not delete it. Name another output."
                )
            foreign = self._foreign(folder)
            if foreign:
                raise RunFolderError(
                    f"{folder} holds what its run did not write: {foreign}. --force does not "
                    f"delete it: move it away, or name another output."
                )

    def _foreign(self, folder: Path) -> str:
        """Some of what is in a folder of the run and is not the run's, in words."""
        if not folder.is_dir():
            return ""
        if folder == self.path or self.lacks_only_its_name:
            found = not_written(folder, RUN)
            return some(sorted(os.listdir(folder)) if found is None else found)
        # While it is written only the names can be told.
        return some(sorted(its for its in os.listdir(folder) if not _is_of_a_run(its)))

    def _check_free(self) -> None:
        if _holds_something(self.path):
            raise RunFolderError(
                f"the output folder {self.path} is not empty. Name another output, or pass --force "
                f"to replace the run in it once the new one is complete."
            )
        if self.working.exists():
            raise RunFolderError(
                f"an unfinished run is in {self.working}. Pass --resume to continue it, or --force "
                f"to discard it and start anew."
            )

    def _check_resumable(self) -> None:
        if not (self.working / CONFIG).is_file():
            if (self.path / RUN).is_file():
                raise RunFolderError(
                    f"the run in {self.path} is complete; there is nothing to resume. Start from "
                    f"its adapter with init_from and another output, or pass --force to redo it."
                )
            raise RunFolderError(
                f"there is no unfinished run of {self.path} to resume. Leave --resume out, or pass "
                f"--resume auto, which starts one."
            )
        foreign = self._foreign(self.path)
        if foreign:
            raise RunFolderError(
                f"{self.path} holds what no run wrote: {foreign}. The run would take its place "
                f"when it is complete: move it away first."
            )
        if self._is_another_there():
            raise RunFolderError(
                f"another run was put into {self.path} since the one in {self.working} began, "
                f"which would take its place when it is complete: move the other away first."
            )
        self._check_same_settings(self.working)
        if (self.working / INPUTS).is_file():  # else only the name is lacking
            self._check_same_data(self.working, self._inputs())
        self.found = find_newest(self.checkpoints)
        newest, now = self.found.newest, world_size()
        if newest and self.settings.method in NOT_RESUMED:
            raise RunFolderError(
                f"the run in {self.working} cannot be resumed: PEFT's AdaLoRA keeps the averages "
                f"it prunes by in memory only, so it would prune other ranks. Pass --force instead "
                f"to start anew."
            )
        if newest and newest.processes != now:
            raise RunFolderError(
                f"{newest.path} was written by {newest.processes} processes, and this run has "
                f"{now}. Resume with as many: by --processes {newest.processes}, or by the "
                f"launcher it was started with."
            )

    def _check_same_data(self, folder: Path, before: dict[str, int] | None) -> None:
        if before is None:
            raise RunFolderError(f"{folder / RUN} is not whole: name another output.")
        changed = inputs.changed(before, self.settings)
        if changed:
            raise RunFolderError(
                f"the {self._state(folder)} run in {folder} began with other files: "
                f"{', '.join(changed)} changed since. Put the old content back, or pass --force "
                f"instead to start anew."
            )

    def _state(self, folder: Path) -> str:
        return "unfinished" if folder == self.working else "complete"

    def _inputs(self) -> dict[str, int]:
        return json.loads((self.working / INPUTS).read_text(encoding="utf-8"))

    def _check_same_settings(self, folder: Path) -> None:
        before, free = read_settings(folder / CONFIG), free_to_change(self.settings.method)
        if self.checkpoints.exists():
            free |= {"devices.processes"}  # where there is a checkpoint, it knows how many it needs
        changed = differences(before, self.settings, free)
        if changed and folder == self.working:
            raise RunFolderError(
                f"the unfinished run in {folder} has other settings: {changed}. Resume with the "
                f"same ones, or name another output for these, without --resume. --force would "
                f"discard the run."
            )
        if changed:
            start = can_start_from(before, self.settings)
            raise RunFolderError(
                f"the complete run in {folder} has other settings: {changed}. Name another output "
                f"for these"
                + (f", with init_from: {folder} to start from its adapter" if start else "")
                + ". --force would replace the run."
            )


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _is_of_a_run(name: str) -> bool:
    return name in _WRITTEN or (name.startswith(".") and name.endswith(".partial"))
