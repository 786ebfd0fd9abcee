"""Whether the data files of a run are those that it began with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .checkpoints import checksum
from .settings import Settings


def checksums(settings: Settings) -> dict[str, int]:
    """Every local file that the data section names, that is in a folder it names, or an image."""
    files = dict.fromkeys(_files(settings.data.model_dump()))
    if settings.task == "image-classification":
        from .data_images import image_files  # which needs Pillow

        files |= dict.fromkeys(image_files(settings.data))
    return {str(file): checksum(file) for file in files}


def changed(before: dict[str, int], settings: Settings) -> list[str]:
    """The files that are new, gone or other than they were."""
    now = checksums(settings)
    return sorted(file for file in before.keys() | now.keys() if before.get(file) != now.get(file))


def _files(value: Any) -> Iterator[Path]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _files(one)
    elif isinstance(value, str) and Path(value).is_absolute():
        path = Path(value)
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                yield file
