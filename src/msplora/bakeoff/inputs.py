"""What a run reads, by checksums that are the same on every machine and under every path."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from msplora.train.absolute_paths import with_absolute_paths
from msplora.train.checkpoints import checksum
from msplora.train.data_sources import named_sources
from msplora.train.init_from import start_companions, start_files
from msplora.train.settings import Settings
from msplora.train.settings_data import Sources

Inputs = dict[str, dict[str, int]]
"""Key of the settings -> file -> checksum. There is no entry for what is on the hub."""

_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_TOKENIZER = ("tokenizer.json", "*.model", "vocab.*", "merges.txt")
_GLUE = ("train", "dev")
_OF_THE_MODEL = ("model", "tokenizer")
_PLACES, _PLACE = 64, 4096
"""Of weights so many places of so many bytes are read: training changes nearly all of them."""


def inputs_of(settings: Settings) -> Inputs:
    """The files of a run's model and data that are on this machine."""
    settings = with_absolute_paths(settings, must_exist=False)
    data = settings.data
    glue = [Path(data.path) / f"{its}.tsv" for its in _GLUE] if data.path else []
    images = []
    if settings.task == "image-classification":
        from msplora.train.data_images import image_files  # which needs Pillow

        images = sorted(set(image_files(data)))
    found = {
        "model": _those_of(Path(settings.model), _WEIGHTS),
        "tokenizer": _those_of(Path(settings.tokenizer or settings.model), _TOKENIZER),
        "init_from": _checksums([*start_files(settings), *start_companions(settings)]),
        "data.path": _checksums(glue),
        "data.train": _of_sources(data.train, "data.train"),
        "data.validation": _of_sources(data.validation, "data.validation"),
        "data.chat_template": _of_sources(data.chat_template, "data.chat_template"),
        "the images": _checksums(images),
    }
    return {key: its for key, its in found.items() if its}


def compare(before: Inputs, now: Inputs) -> dict[str, list[str]]:
    """Key -> the files that are not those of before, for each key that can be compared.

    The name of a single file says nothing. A model in another format cannot be compared.
    """
    found = {}
    for key in sorted(before.keys() & now.keys()):
        old, new = before[key], now[key]
        if key in _OF_THE_MODEL and old.keys() != new.keys():
            continue
        if len(old) == len(new) == 1:
            found[key] = [name for name in new if list(old.values()) != list(new.values())]
            continue
        changed = [its for its in {**new, **old} if old.get(its) != new.get(its)]
        is_reordered = not changed and list(old) != list(new)
        found[key] = list(new) if is_reordered else changed
    return found


def _of_sources(value: Sources | None, key: str) -> dict[str, int]:
    if isinstance(value, str) and (folder := Path(value)).is_dir():  # of images
        return _checksums(sorted(folder.rglob("*")))
    return _checksums(Path(its.path) for its in named_sources(value, key) if its.path)


def _those_of(folder: Path, patterns: Iterable[str]) -> dict[str, int]:
    return _checksums(sorted(file for its in patterns for file in folder.glob(its)))


def _checksums(files: Iterable[Path]) -> dict[str, int]:
    """By names below the folder that all files are in."""
    files = [file.absolute() for file in files if file.is_file()]
    if not files:
        return {}
    root = Path(os.path.commonpath([file.parent for file in files]))
    return {file.relative_to(root).as_posix(): _checksum(file) for file in files}


def _checksum(file: Path) -> int:
    its = file.stat()
    is_weights = any(file.match(pattern) for pattern in _WEIGHTS)
    return _read(file, its.st_size, its.st_mtime_ns, is_weights)


@cache
def _read(file: Path, size: int, changed: int, is_weights: bool) -> int:
    """`changed`, when it was, makes it be read again."""
    if not is_weights:
        return checksum(file)
    found = zlib.crc32(str(size).encode())
    with file.open("rb") as stream:
        for place in range(_PLACES):
            stream.seek(place * max(size - _PLACE, 0) // (_PLACES - 1))
            found = zlib.crc32(stream.read(_PLACE), found)
    return found
