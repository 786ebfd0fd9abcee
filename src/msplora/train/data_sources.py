"""The files and hub datasets that a run reads, and how often each of their rows is seen."""

from __future__ import annotations

import glob
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from .data_files import DataError, Row, hub_name, read_hub, read_rows, read_text, suffix_of
from .settings_data import DataSource, Sources

Item = TypeVar("Item")

WHOLE_TEXT = ".txt"
"""The suffix of a file that is one text and has no rows until it is cut into chunks."""


def named_sources(value: Sources | None, key: str) -> list[DataSource]:
    """Return every source that a setting names, a pattern's files one by one in their order."""
    written = [DataSource(path=value)] if isinstance(value, str) else list(value or [])
    found = []
    for source in written:
        paths = _matches(source.path, key) if source.path is not None else [None]
        found += [source.model_copy(update={"path": path}) for path in paths]
    seen = set[str]()
    for source in found:
        name = source_name(source)
        whole = _absolute(name) if source.path is not None else name  # one file, however spelled
        if whole in seen:
            raise DataError(f"{key} names {name} twice. Name it once; a weight repeats its rows.")
        seen.add(whole)
    return found


def absolute_sources(value: Sources | None, key: str) -> Sources | None:
    """The same sources by absolute paths and without patterns, so that they hold from any folder.

    What a pattern matched is what is recorded: a file that comes later is not of the run.
    """
    if value is None:
        return None
    if isinstance(value, str) and not _is_pattern(value):
        return _absolute(value)
    return [
        source.model_copy(update={"path": _absolute(source.path) if source.path else None})
        for source in named_sources(value, key)
    ]


def source_name(source: DataSource) -> str:
    """What a source is called in notes and errors."""
    if source.path is not None:
        return source.path
    assert source.hub is not None  # a source has one of the two
    return hub_name(source.hub, source.split, source.config)


def is_whole_text(source: DataSource) -> bool:
    """Whether the source is one text and not rows."""
    return source.path is not None and suffix_of(source.path) == WHOLE_TEXT


def read_source(source: DataSource, whole_texts: bool = False) -> list[Row]:
    """Return the rows of one source; a whole text, where it may be one, is a row with a `text`."""
    if source.hub is not None:
        return read_hub(source.hub, source.split, source.config, source.revision)
    assert source.path is not None  # a source has one of the two
    if whole_texts and is_whole_text(source):
        return [Row(source.path, {"text": read_text(source.path)})]
    return read_rows(source.path)


def repeated(items: Sequence[Item], weight: float, seed: str) -> list[Item]:
    """Return each item as often as its weight says, the share below one drawn by `seed`."""
    whole = int(weight)
    chosen = set(
        random.Random(seed).sample(range(len(items)), round(len(items) * (weight - whole)))
    )
    return [
        item
        for place, item in enumerate(items)
        for _ in range(whole + (1 if place in chosen else 0))
    ]


def _matches(path: str, key: str) -> list[str]:
    if not _is_pattern(path):
        return [path]
    found = sorted(
        its
        for its in glob.glob(str(Path(path).expanduser()), recursive=True)
        if Path(its).is_file()
    )
    if not found:
        raise DataError(f"{key}: no file matches the pattern {path}.")
    return found


def _is_pattern(path: str) -> bool:
    return glob.has_magic(path) and not Path(path).expanduser().exists()


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())
