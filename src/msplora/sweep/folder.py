"""The folder of a sweep: who may write there, and what was made under which base config."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from msplora.errors import MSPLoraError
from msplora.train.checkpoints import clear, remove, write_whole
from msplora.train.run_folder import CONFIG, METRICS
from msplora.train.settings_file import as_yaml, read_content

from .naming import shown
from .reading import SEED, Sweep, make_sweep
from .rows import essence

SWEEP = "sweep.yaml"
RUNS, LOGS = "runs", "logs"


class SweepFolderError(MSPLoraError):
    """The output folder is taken, or holds another sweep."""


def hold(folder: Path, what: str) -> int:
    """Keep other processes from a folder until the descriptor returned is closed, here and in the
    processes that inherit it.

    Raises:
        SweepFolderError: another process holds it.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise SweepFolderError(
            f"another process is at work on {what}. Wait for it, or stop it."
        ) from None
    except OSError:
        pass  # some network file systems have no locks: then it is the user's to take care
    return lock


class SweepFolder:
    """A sweep's folder. Making one checks it, and touches nothing; `begin` makes and locks it."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.path = sweep.output
        self.lock = -1
        if self.path.is_file():
            raise SweepFolderError(f"the output {self.path} is a file; name a folder.")
        if (self.path / SWEEP).is_file():
            self._check_same_base()
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise SweepFolderError(
                f"the output folder {self.path} is not empty and holds no sweep. Name another."
            )

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.path / RUNS / name

    def log(self, name: str) -> Path:
        """The file with what a run printed."""
        return self.path / LOGS / f"{name}.log"

    def begin(self) -> None:
        """Make the folder, hold it until this process and its runs' have ended, and write into it
        what is swept, for the next time.
        """
        try:
            for folder in (RUNS, LOGS):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SweepFolderError(f"the output {self.path} cannot be made: {error}.") from None
        self.lock = hold(self.path, f"the sweep in {self.path}")
        clear(self.path / RUNS)
        write_whole(self.path / SWEEP, as_yaml(self.sweep.as_file()))

    def release(self) -> None:
        """Let others at it."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def remove_run(self, name: str) -> None:
        """Delete the folder of a complete run, if it is one."""
        run = self.run(name)
        if (run / CONFIG).is_file() and (run / METRICS).is_file():
            remove(run)

    def remove_unfinished(self, name: str) -> None:
        """Delete what a run that cannot go on has left: its checkpoints are of no use."""
        unfinished = self.run(f"{name}.unfinished")
        if (unfinished / CONFIG).is_file():
            remove(unfinished)

    def _check_same_base(self) -> None:
        """What is swept may change: the same runs are found again. What all runs share may not."""
        there = make_sweep(read_content(self.path / SWEEP), str(self.path / SWEEP))
        before, now = essence(there.shared()), essence(self.sweep.shared())
        free = {*there.swept, *self.sweep.swept}
        if there.settings.seeds or self.sweep.settings.seeds:
            free.add(SEED)
        changed = [
            f"{key} was {shown(before.get(key))} and is {shown(now.get(key))}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key not in free
        ]
        if changed:
            raise SweepFolderError(
                f"the sweep in {self.path} was made with another base config: "
                f"{'; '.join(changed)}. Its runs cannot be compared with new ones: name another "
                f"output, or sweep that key too."
            )
