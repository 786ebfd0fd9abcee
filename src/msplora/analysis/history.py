"""An adapter over its training: summaries of its checkpoints, or what its run recorded of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msplora.errors import AdapterFileError, BaseModelError, MSPLoraError
from msplora.loading import CONFIG_FILE, BaseOptions

from .kinds import KindUpdates, coarser, level_measures
from .reading import read_adapter
from .results import Checkpoint, LevelSummary, Number, mean
from .stored import StoredAdapter
from .summary import summarise
from .too_large import check_norms, products_that_are_numbers

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
    damaged: Mapping[int, MSPLoraError]
    """Step → why a checkpoint that is there cannot be read."""
    notes: tuple[str, ...] = ()
    """What the reader of the figures should know, in sentences."""


def checkpoint_folders(path: Path, config: str = CONFIG_FILE) -> list[Path]:
    """The checkpoints of an adapter within its folder, by their step.

    They are where transformers' trainer, or a run that is not finished, has them: in the folder
    itself or in its `checkpoints`.

    Args:
        path: the folder.
        config: the name of the file that each has; a whole model's is another than an adapter's.
    """
    found = {
        step_of(folder): folder
        for where in (path, path / "checkpoints")
        for folder in where.glob(f"{_NAME}*")
        if folder.name.removeprefix(_NAME).isdecimal() and (folder / config).is_file()
    }
    return [found[step] for step in sorted(found)]


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix(_NAME))


def read_history(path: Path, adapter: StoredAdapter, base: BaseOptions | None = None) -> History:
    """Read the checkpoints of an adapter, where there are several.

    A folder may hold those of an earlier run: what has other levels, ranks, scales or weights is
    left out.
    So is what cannot be read: the adapter itself may be whole.

    Args:
        path: the folder of the adapter or its run.
        adapter: what was found there.
        base: asked for where a file alone does not say which weights share.

    Raises:
        AdapterFileError: the record of the checkpoints is none.
    """
    recorded = {its.step: its for its in _recorded(path)}
    folders = [its for its in checkpoint_folders(path) if step_of(its) not in recorded]
    if len(recorded) + len(folders) < 2:
        return History({}, {}, {})
    stored: dict[int, StoredAdapter] = {}
    damaged: dict[int, MSPLoraError] = {}
    for folder in folders:
        try:
            stored[step_of(folder)] = _read(folder, base)
        except MSPLoraError as error:
            damaged[step_of(folder)] = error
    ranks = {step: {its.level: its.rank for its in one.levels} for step, one in recorded.items()}
    ranks |= {step: its.ranks for step, its in stored.items()}
    others = [
        step
        for step in sorted(ranks)
        if list(ranks[step].items()) != list(adapter.ranks.items())
        or (step in stored and not _alike(stored[step], adapter))
    ]
    notes = [_left_out(others, ranks[others[0]], stored.get(others[0]), adapter)] if others else []
    recorded = {step: its for step, its in recorded.items() if step not in others}
    stored = {step: its for step, its in stored.items() if step not in others}
    if len(recorded) + len(stored) < 2:  # one is no course
        recorded, stored = {}, {}
    return History(recorded, stored, damaged, tuple(notes))


def _alike(one: StoredAdapter, other: StoredAdapter) -> bool:
    """Whether two have the same weights, of the same shapes and scales."""
    return one.shapes == other.shapes and one.scales == other.scales


def _left_out(
    steps: list[int],
    ranks: Mapping[str, int],
    first: StoredAdapter | None,
    adapter: StoredAdapter,
) -> str:
    """That checkpoints are not the adapter's, in a sentence.

    Args:
        steps: theirs.
        ranks: those of the first, level by level.
        first: the first, where its file is there.
        adapter: the one that they are beside.
    """
    described = ", ".join(
        f"{level} of rank {rank}" + (f" and scale {_range(first.scales[level])}" if first else "")
        for level, rank in ranks.items()
    )
    # PEFT converts what takes a part of the base (PiSSA) to a LoRA of twice the rank.
    converted = [2 * rank for rank in ranks.values()] == list(adapter.ranks.values())
    return (
        f"{len(steps)} checkpoint(s) have other levels, ranks, scales or weights than the adapter, "
        f"such as that of step {steps[0]} ({described}): they are another run's"
        + (", or of before a conversion that doubled the rank" if converted else "")
        + ", and are not shown over training."
    )


def _range(values: Sequence[float]) -> str:
    """The least and the largest of sorted values, or the one that all are."""
    return " to ".join(f"{its:.4g}" for its in dict.fromkeys((values[0], values[-1])))


def over_training(
    history: History, report: Callable[[int, int], None]
) -> tuple[tuple[Checkpoint, ...], tuple[str, ...]]:
    """Measure what is not recorded, and note what cannot be measured.

    Returns:
        The checkpoints by their step, and what the reader of the figures should know.
    """
    found, damaged = dict(history.recorded), dict(history.damaged)
    for done, (step, adapter) in enumerate(history.stored.items(), start=1):
        try:
            found[step] = measured(step, adapter)
        except MSPLoraError as error:
            damaged[step] = error
        report(done, len(history.stored))
    notes = list(history.notes)
    if damaged:
        first = min(damaged)
        notes.append(
            f"{len(damaged)} checkpoint(s) cannot be shown over training, such as that of step "
            f"{first}: {damaged[first]}"
        )
    course = tuple(found[step] for step in sorted(found))
    return course if len(course) > 1 else (), tuple(notes)


def checkpoint(folder: Path, base: BaseOptions | None = None) -> Checkpoint:
    """What is followed over training, of one checkpoint.

    Args:
        folder: of the checkpoint.
        base: asked for where the file alone does not say which weights share.
    """
    return measured(step_of(folder), _read(folder, base))


def measured(step: int, adapter: StoredAdapter) -> Checkpoint:
    """What is followed over training, of an adapter as it was at a step.

    Raises:
        AdapterFileError: an update is too large for a number.
    """
    measures, columns, rows = [], [], []
    for kind in adapter.kinds:
        with products_that_are_numbers(adapter.path, kind.name):
            updates = KindUpdates(kind, adapter.levels)
            of_kind = level_measures(updates)
            overlap = coarser(updates)
        for of_site in of_kind:
            check_norms(adapter.path, kind.name, of_site)
        measures += of_kind
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
                int(_number(its["step"])),
                tuple(_level(level) for level in its["levels"]),
                _number_or_none(its["coarser_columns"]),
                _number_or_none(its["coarser_rows"]),
            )
            for its in content
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterFileError(
            f"{str(file)!r} is no record of a run's levels ({type(error).__name__}: {error}). Move "
            f"it away: without it the adapter is analysed as it is."
        ) from error


def _level(of: Mapping[str, Any]) -> LevelSummary:
    figures = ("share", "effective_rank", "stable_rank")
    checked = {name: _number_or_none(of[name]) for name in figures}
    its = {**of, **checked, "norm": _number(of["norm"]), "rank": int(_number(of["rank"]))}
    return LevelSummary(**its)


def _number_or_none(value: Any) -> Number:
    return None if value is None else _number(value)


def _number(value: Any) -> float:
    """A finite number; JSON's readers take NaN too, and its writers and charts do not."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return value
    raise ValueError(f"{value!r} is no number")
