"""An adapter over its training: summaries of its checkpoints, or what its run recorded of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from msplora.errors import AdapterFileError, BaseModelError
from msplora.loading import CONFIG_FILE, BaseOptions

from .kinds import KindUpdates, coarser, level_measures
from .reading import read_adapter
from .results import Checkpoint, LevelSummary, mean
from .stored import StoredAdapter
from .summary import summarise

RECORD = "levels.json"
"""What `msplora train` leaves of the checkpoints that it drops."""
_NAME = "checkpoint-"


@dataclass(frozen=True)
class History:
    """The checkpoints of an adapter before they are measured."""

    recorded: Mapping[int, Checkpoint]
    """Step → what its run recorded."""
    stored: Mapping[int, StoredAdapter]
    """Step → a checkpoint that is there, and is not recorded."""
    notes: tuple[str, ...] = ()
    """What the reader of the figures should know, in sentences."""


def checkpoint_folders(path: Path) -> list[Path]:
    """The checkpoints of an adapter within its folder, by their step.

    They are where transformers' trainer, or a run that is not finished, has them: in the folder
    itself or in its `checkpoints`.
    """
    found = {
        step_of(folder): folder
        for where in (path, path / "checkpoints")
        for folder in where.glob(f"{_NAME}*")
        if folder.name.removeprefix(_NAME).isdecimal() and (folder / CONFIG_FILE).is_file()
    }
    return [found[step] for step in sorted(found)]


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix(_NAME))


def read_history(path: Path, levels: tuple[str, ...], base: BaseOptions | None = None) -> History:
    """Read the checkpoints of an adapter, where there are several.

    A folder may hold those of an earlier run: what has other levels is left out.

    Args:
        path: the folder of the adapter or its run.
        levels: the adapter's.
        base: asked for where a file alone does not say which weights share.

    Raises:
        MSPLoraError: a checkpoint, or the record of them, cannot be read.
    """
    recorded = {its.step: its for its in _recorded(path)}
    folders = [its for its in checkpoint_folders(path) if step_of(its) not in recorded]
    if len(recorded) + len(folders) < 2:
        return History({}, {})
    stored = {step_of(folder): _read(folder, base) for folder in folders}
    names = {step: tuple(its.level for its in one.levels) for step, one in recorded.items()}
    names |= {step: its.levels for step, its in stored.items()}
    others = [step for step in sorted(names) if names[step] != levels]
    notes = []
    if others:
        notes.append(
            f"{len(others)} checkpoint(s) have other levels than the adapter, such as that of step "
            f"{others[0]} ({', '.join(names[others[0]])}): they are another run's, and are not "
            f"shown over training."
        )
    recorded = {step: its for step, its in recorded.items() if step not in others}
    stored = {step: its for step, its in stored.items() if step not in others}
    several = len(recorded) + len(stored) > 1
    return History(recorded, stored, tuple(notes)) if several else History({}, {}, tuple(notes))


def checkpoint(folder: Path, base: BaseOptions | None = None) -> Checkpoint:
    """What is followed over training, of one checkpoint.

    Args:
        folder: of the checkpoint.
        base: asked for where the file alone does not say which weights share.
    """
    return measured(step_of(folder), _read(folder, base))


def measured(step: int, adapter: StoredAdapter) -> Checkpoint:
    """What is followed over training, of an adapter as it was at a step."""
    measures, columns, rows = [], [], []
    for kind in adapter.kinds:
        updates = KindUpdates(kind, adapter.levels)
        measures += level_measures(updates)
        overlap = coarser(updates)
        if overlap is not None:
            columns += overlap.columns
            rows += overlap.rows
    return Checkpoint(step, summarise(adapter, measures), mean(columns), mean(rows))


def _read(folder: Path, base: BaseOptions | None) -> StoredAdapter:
    try:
        return read_adapter(folder)[0]
    except BaseModelError:
        if base is None or base.source is None:
            raise
        return read_adapter(folder, base)[0]


def _recorded(path: Path) -> list[Checkpoint]:
    """What a run recorded of its checkpoints: a finished one, or one that is not."""
    return read_record(path) or read_record(path / "checkpoints")


def read_record(folder: Path) -> list[Checkpoint]:
    """The checkpoints that the record in a folder tells of, by their step.

    Raises:
        AdapterFileError: the record is none.
    """
    file = folder / RECORD
    if not file.is_file():
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return [
            Checkpoint(
                its["step"],
                tuple(LevelSummary(**level) for level in its["levels"]),
                its["coarser_columns"],
                its["coarser_rows"],
            )
            for its in content
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterFileError(
            f"{str(file)!r} is no record of a run's levels ({type(error).__name__}: {error}). Move "
            f"it away: without it the adapter is analysed as it is."
        ) from error
