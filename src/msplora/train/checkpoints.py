"""Checkpoints that are whole or not there: written beside, sealed, renamed; judged before use.

A folder `checkpoint-<step>` counts only with its seal, the list of its files with their sizes and
checksums, which is written last. What is being written or deleted has another name.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEAL = "checkpoint.json"
WRITING = ".writing"
"""The folder beside the checkpoints in which the next one is written."""
_REMOVING = ".removing-"
_FORMAT_VERSION = 1
_SEALED = {"format_version", "step", "best", "processes", "files"}


class Damaged(Exception):
    """Why a checkpoint cannot be used."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole, as its seal describes it."""

    path: Path
    step: int
    best: int | None
    """The step of the best checkpoint until then, which the end of the run goes back to."""
    processes: int


@dataclass
class Found:
    """The newest checkpoint that can be resumed, and the newer ones that cannot, with why."""

    newest: Checkpoint | None = None
    damaged: dict[Path, str] = field(default_factory=dict)


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step is; transformers looks for it under this name."""
    return checkpoints / f"checkpoint-{step}"


def seal(folder: Path, step: int, best: int | None, processes: int) -> None:
    """Write down what a checkpoint consists of, and have the disk keep all of it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != SEAL)
    content = {
        "format_version": _FORMAT_VERSION,
        "step": step,
        "best": best,
        "processes": processes,
        "files": {
            file.relative_to(folder).as_posix(): [file.stat().st_size, checksum(file)]
            for file in files
        },
    }
    (folder / SEAL).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sync(folder)


def put(written: Path, checkpoints: Path) -> None:
    """Give a sealed checkpoint its name, in place of one of the same step."""
    final = checkpoints / written.name
    if final.exists():
        remove(final)
    written.rename(final)
    _sync_one(checkpoints)


def find_newest(checkpoints: Path) -> Found:
    """Look, from the newest checkpoint back, for one that is whole and whose best one is."""
    found = Found()
    for path in reversed(_named(checkpoints)):
        try:
            checkpoint = read(path)
            if checkpoint.best not in (None, checkpoint.step):
                _read_best(checkpoints, checkpoint.best)
        except Damaged as fault:
            found.damaged[path] = str(fault)
        else:
            found.newest = checkpoint
            break
    return found


def read(folder: Path) -> Checkpoint:
    """Return a checkpoint after comparing every file with the seal.

    Raises:
        Damaged: it was not written to its end, or a file is missing, cut or altered.
    """
    content = _read_seal(folder)
    for name, (size, expected) in content["files"].items():
        file = folder / name
        if not file.is_file():
            raise Damaged(f"{name} is missing")
        if file.stat().st_size != size:
            raise Damaged(f"{name} has {file.stat().st_size:,} bytes instead of {size:,}")
        if checksum(file) != expected:
            raise Damaged(f"{name} is not what was written: its checksum differs")
    return Checkpoint(folder, content["step"], content["best"], content["processes"])


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep`, and the best ones that these would go back to."""
    newest = _named(checkpoints)[-keep:]
    bests = {_best_of(path) for path in newest}
    for path in _named(checkpoints):
        if path not in newest and _step(path) not in bests:
            remove(path)


def _best_of(checkpoint: Path) -> int | None:
    try:
        return _read_seal(checkpoint)["best"]
    except Damaged:  # a run went on from another one, and nothing will go back to this
        return None


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, or a run; from the first moment on it no longer looks like one."""
    away = checkpoint.with_name(_REMOVING + checkpoint.name)
    shutil.rmtree(away, ignore_errors=True)
    checkpoint.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def clear(checkpoints: Path) -> None:
    """Remove what a process that was killed was writing or deleting in this folder."""
    for path in checkpoints.iterdir():
        if path.name == WRITING or path.name.startswith(_REMOVING):
            shutil.rmtree(path, ignore_errors=True)


def sync(folder: Path) -> None:
    """Have the disk keep a folder and all in it, so that a power cut leaves it whole."""
    for path in [folder, *folder.rglob("*")]:
        _sync_one(path)


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is the old one or the new one, whatever happens meanwhile."""
    beside = file.with_name(f".{file.name}.partial")
    beside.write_text(text, encoding="utf-8")
    _sync_one(beside)
    beside.replace(file)


def _read_best(checkpoints: Path, step: int) -> None:
    best = checkpoint_folder(checkpoints, step)
    try:
        read(best)
    except Damaged as fault:
        raise Damaged(f"the best one until then, {best.name}, cannot be used: {fault}") from None


def _read_seal(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or not content.keys() >= _SEALED:
        raise Damaged(f"it has no readable {SEAL}, which is written last")
    if content["format_version"] != _FORMAT_VERSION:
        raise Damaged(
            f"its format_version is {content['format_version']}; this msplora reads "
            f"{_FORMAT_VERSION}"
        )
    return content


def _named(checkpoints: Path) -> list[Path]:
    """Every folder that has the name of a checkpoint, the oldest first."""
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def checksum(file: Path) -> int:
    """The CRC-32 of what a file holds: against accidents, and as fast as a disk reads."""
    found = 0
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            found = zlib.crc32(block, found)
    return found


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
