"""The folder of a run: whole or not there. Work goes on beside it, and is renamed at the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msplora.errors import MSPLoraError

from .settings import Settings
from .settings_file import read_settings, write_settings

CONFIG = "config.yaml"
METRICS = "metrics.json"
DATA = "data.json"
BEFORE = "before.json"
"""What was measured before the first step, kept for a run that is resumed."""

# Settings that change no number of the result, so a run may be resumed under others.
_FREE_TO_CHANGE = frozenset({"output", "training.eval_batch_size", "training.save_limit"})


class RunFolderError(MSPLoraError):
    """The output folder is taken, or holds nothing to resume."""


class RunFolder:
    """Where a run is written: in `<output>.unfinished` until it is complete, then in `<output>`.

    Making one checks that the run may be written there, and touches nothing.
    """

    def __init__(self, settings: Settings, resume: bool = False, force: bool = False) -> None:
        self.settings = settings
        self.path = Path(settings.output).expanduser().resolve()
        self.working = self.path.with_name(self.path.name + ".unfinished")
        self.resumes = resume
        if resume and force:
            raise RunFolderError("--resume continues a run and --force discards it; give one.")
        if self.path.is_file():
            raise RunFolderError(f"the output {self.path} is a file; name a folder.")
        self._check_writable()
        if resume:
            self._check_resumable()
        elif not force:
            self._check_free()
        else:
            self._check_discardable()

    @property
    def checkpoints(self) -> Path:
        """Where the trainer saves while it trains."""
        return self.working / "checkpoints"

    def begin(self) -> None:
        """Make the working folder (or take up the one to resume)."""
        if self.resumes:
            return
        if self.working.exists():
            shutil.rmtree(self.working)
        self.checkpoints.mkdir(parents=True)
        write_settings(self.settings, self.working / CONFIG)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end; half-written ones are removed."""
        if not self.resumes or not self.checkpoints.is_dir():
            return None
        found = [
            folder
            for folder in self.checkpoints.iterdir()
            if re.fullmatch(r"checkpoint-\d+", folder.name)
        ]
        whole = []
        for folder in found:
            if _is_whole(folder):
                whole.append(folder)
            else:
                shutil.rmtree(folder)
        return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)

    def write_json(self, name: str, content: Mapping[str, Any] | list[Any]) -> None:
        """Write a JSON file of the run."""
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        (self.working / name).write_text(text, encoding="utf-8")

    def finish(self) -> Path:
        """Drop the checkpoints and give the folder its name; return where the run now is."""
        shutil.rmtree(self.checkpoints)
        (self.working / BEFORE).unlink(missing_ok=True)
        if self.path.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
            self.path.rename(replaced / self.path.name)
            self.working.rename(self.path)
            shutil.rmtree(replaced)
        else:
            self.working.rename(self.path)
        return self.path

    def _check_writable(self) -> None:
        parent = self.path.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise RunFolderError(
                f"the output {self.path} cannot be made: {parent} is no folder "
                f"that can be written to."
            )

    def _check_discardable(self) -> None:
        """Of what --force would delete: it must be what a run left, and nothing else."""
        for folder, marks in ((self.path, (CONFIG, METRICS)), (self.working, (CONFIG,))):
            missing = [mark for mark in marks if not (folder / mark).is_file()]
            if _holds_something(folder) and missing:
                raise RunFolderError(
                    f"{folder} holds files but no {missing[0]}, so it is not a run, and --force "
                    f"does not delete it. Name another output."
                )

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
            if (self.path / METRICS).is_file():
                raise RunFolderError(
                    f"the run in {self.path} is complete; there is nothing to resume. Start from "
                    f"its adapter with init_from and another output, or pass --force to redo it."
                )
            raise RunFolderError(
                f"there is no unfinished run of {self.path} to resume. Leave --resume out."
            )
        before = _flat(read_settings(self.working / CONFIG).to_dict())
        now = _flat(self.settings.to_dict())
        changed = [
            f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key not in _FREE_TO_CHANGE
        ]
        if changed:
            raise RunFolderError(
                f"the unfinished run in {self.working} has other settings: {'; '.join(changed)}. "
                f"Resume with the same ones, or pass --force instead to start anew."
            )


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _is_whole(checkpoint: Path) -> bool:
    # The trainer writes this file last.
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and key != "columns":
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
