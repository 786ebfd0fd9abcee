"""An adapter over its training: the summaries of a run's checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from msplora.loading import CONFIG_FILE

from .kinds import KindUpdates, coarser, level_measures
from .reading import read_adapter
from .results import Checkpoint, mean
from .summary import summarise

_NAME = "checkpoint-"


def checkpoint_folders(path: Path) -> list[Path]:
    """The checkpoints of an adapter beside, below or within a path, by their step.

    They are where transformers' trainer, or a run that is not finished, has them: in the folder
    itself or in its `checkpoints`.
    """
    found = {
        int(folder.name.removeprefix(_NAME)): folder
        for where in (path, path / "checkpoints")
        for folder in where.glob(f"{_NAME}*")
        if folder.name.removeprefix(_NAME).isdecimal() and (folder / CONFIG_FILE).is_file()
    }
    return [found[step] for step in sorted(found)]


def checkpoint(folder: Path, done: Callable[[], None] = lambda: None) -> Checkpoint:
    """What is followed over training, of one checkpoint."""
    adapter, _ = read_adapter(folder)
    measures, columns, rows = [], [], []
    for kind in adapter.kinds:
        updates = KindUpdates(kind, adapter.levels)
        measures += level_measures(updates)
        overlap = coarser(updates)
        if overlap is not None:
            columns += overlap.columns
            rows += overlap.rows
    done()
    return Checkpoint(
        int(folder.name.removeprefix(_NAME)),
        summarise(adapter, measures),
        mean(columns),
        mean(rows),
    )
