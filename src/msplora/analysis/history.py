"""An adapter over its training: summaries of its checkpoints, or what its run recorded of them."""

from __future__ import annotations

import json
from pathlib import Path

from msplora.errors import AdapterFileError, BaseModelError
from msplora.loading import CONFIG_FILE, BaseOptions

from .kinds import KindUpdates, coarser, level_measures
from .reading import read_adapter
from .results import Checkpoint, LevelSummary, mean
from .summary import summarise

RECORD = "levels.json"
"""What `msplora train` leaves of the checkpoints that it drops."""
_NAME = "checkpoint-"


def checkpoint_folders(path: Path) -> list[Path]:
    """The checkpoints of an adapter beside, below or within a path, by their step.

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


def checkpoint(folder: Path, base: BaseOptions | None = None) -> Checkpoint:
    """What is followed over training, of one checkpoint.

    Args:
        folder: of the checkpoint.
        base: asked for where the file alone does not say which weights share.
    """
    try:
        adapter, _ = read_adapter(folder)
    except BaseModelError:
        if base is None or base.source is None:
            raise
        adapter, _ = read_adapter(folder, base)
    measures, columns, rows = [], [], []
    for kind in adapter.kinds:
        updates = KindUpdates(kind, adapter.levels)
        measures += level_measures(updates)
        overlap = coarser(updates)
        if overlap is not None:
            columns += overlap.columns
            rows += overlap.rows
    return Checkpoint(
        step_of(folder),
        summarise(adapter, measures),
        mean(columns),
        mean(rows),
    )


def recorded(path: Path) -> list[Checkpoint]:
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
