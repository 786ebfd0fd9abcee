"""Whether the files that a run reads are those that it began with."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .checkpoints import checksum
from .init_from import start_companions, start_files
from .settings import Settings


def checksums(settings: Settings) -> dict[str, int]:
    """Every local file that the data section names or that is in a folder it names, every image,
    and the files of the adapter that the run starts from.
    """
    files = dict.fromkeys(_files(settings.data.model_dump()))
    if settings.task == "image-classification":
        from .data_images import image_files  # which needs Pillow

        files |= dict.fromkeys(image_files(settings.data))
    files |= dict.fromkeys([*start_files(settings), *start_companions(settings)])
    return {str(file): checksum(file) for file in files}


def fingerprint(settings: Settings) -> dict[str, int]:
    """A checksum of all files of the data, and one of the adapter that the run starts from, by
    their names and what they hold: the same wherever on a machine they are. Paths are absolute.
    """
    start = {str(its) for its in (*start_files(settings), *start_companions(settings))}
    folders = [folder for folder in _paths(settings.data.model_dump()) if folder.is_dir()]
    files: dict[str, list[tuple[str, int]]] = {}
    for file, its in checksums(settings).items():
        inside = [Path(file).relative_to(its) for its in folders if its in Path(file).parents]
        name = inside[0].as_posix() if inside else Path(file).name
        files.setdefault("init_from" if file in start else "data", []).append((name, its))
    return {what: zlib.crc32(repr(sorted(found)).encode()) for what, found in files.items()}


def data_paths(settings: Settings) -> list[str]:
    """The files and folders that the data section names."""
    return [str(path) for path in _paths(settings.data.model_dump())]


def knows_start(before: dict[str, int], settings: Settings) -> bool:
    """Whether the adapter that the run starts from is among them: older msploras left it
    out.
    """
    return any(str(file) in before for file in start_files(settings))


def changed(before: dict[str, int], settings: Settings) -> list[str]:
    """The files that are new, gone or other than they were."""
    now = checksums(settings)
    if not knows_start(before, settings):
        start = {*start_files(settings), *start_companions(settings)}
        now = {file: its for file, its in now.items() if Path(file) not in start}
    return sorted(file for file in before.keys() | now.keys() if before.get(file) != now.get(file))


def _files(value: Any) -> Iterator[Path]:
    for path in _paths(value):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                yield file


def _paths(value: Any) -> Iterator[Path]:
    """What a section of the settings names by absolute paths."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _paths(one)
    elif isinstance(value, str) and Path(value).is_absolute():
        yield Path(value)
