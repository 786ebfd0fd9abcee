"""The mark of a folder: what a command wrote in it, so that `--force` deletes nothing else.

What was trained on, edited or put beside a result since is nobody's to replace. Sizes and times do
not tell: a LoRA that was trained on has its old size, and a copy has new times.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import __version__

CONVERSION = "conversion.json"
"""The file that holds the mark of a conversion."""

_FILES = "files"


def write_mark(
    folder: Path, mark: str, facts: Mapping[str, Any], leave_out: Collection[str] = ()
) -> None:
    """Write the mark of what is in `folder`: a checksum of every file, and some facts.

    Args:
        folder: what a command has written.
        mark: the name of the file to write in it.
        facts: what else to say there.
        leave_out: what in the folder is on its way out.
    """
    beside = folder / f".{mark}.partial"
    beside.unlink(missing_ok=True)  # of a process that was killed
    files = {
        str(path.relative_to(folder)): _checksum(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path != folder / mark
        and path.relative_to(folder).parts[0] not in leave_out
    }
    content = {**facts, "msplora": __version__, _FILES: files}
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(folder / mark)


def read_mark(folder: Path, mark: str) -> dict[str, Any] | None:
    """The facts of a mark with its checksums; `None` where there is none that can be read."""
    try:
        content = json.loads((folder / mark).read_text(encoding="utf-8"))
        return content if isinstance(content[_FILES], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def not_written(folder: Path, mark: str) -> list[str] | None:
    """What a folder holds that was not written with its mark, or not so; `None` without a mark.

    Returns:
        For each a few words: its name, and where it was written otherwise, that it changed.
    """
    content = read_mark(folder, mark)
    if content is None:
        return None
    recorded = {folder / name: checksum for name, checksum in content[_FILES].items()}
    folders = {folder, *(parent for path in recorded for parent in path.parents)}
    found = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name == mark or path in folders or path.parent not in folders:
            continue  # below a folder that is named as a whole
        if path not in recorded:
            found.append(name)
        elif path.is_symlink() or not path.is_file() or _checksum(path) != recorded[path]:
            found.append(f"{name} (changed since)")
    return found


def some(names: list[str]) -> str:
    """The first few of many names."""
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} more" if more > 0 else "")


def _checksum(file: Path) -> str:
    its = file.stat()
    return _checksum_of(str(file), its.st_ino, its.st_size, its.st_mtime_ns)


@lru_cache(maxsize=1024)
def _checksum_of(file: str, *_unchanged: int) -> str:
    """A merged model is large, and a conversion looks three times."""
    summed = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(1 << 20):
            summed.update(chunk)
    return summed.hexdigest()
