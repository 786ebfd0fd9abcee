"""The mark of a conversion: what it wrote, so that `--force` deletes nothing else.

What was trained on, edited or put beside a conversion since is nobody's to replace. Sizes and
times do not tell: a LoRA that was trained on has its old size, and a copy has new times.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from . import __version__

MARK = "conversion.json"
"""The file that holds it."""

_FILES = "files"


def write_mark(folder: Path, source: str) -> None:
    """Write the mark of a conversion of `source` that is in `folder`: a checksum of every file."""
    files = {
        str(path.relative_to(folder)): _checksum(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {"from": source, "msplora": __version__, _FILES: files}
    (folder / MARK).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def not_of_the_conversion(folder: Path) -> list[str] | None:
    """What a folder holds that its conversion did not write, or not so; `None` without a mark.

    Returns:
        For each a few words: its name, and where it was written otherwise, that it changed.
    """
    try:
        files = json.loads((folder / MARK).read_text(encoding="utf-8"))[_FILES]
        recorded = {folder / name: checksum for name, checksum in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    folders = {folder, *(parent for path in recorded for parent in path.parents)}
    found = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name == MARK or path in folders or path.parent not in folders:
            continue  # below a folder that is named as a whole
        if path not in recorded:
            found.append(name)
        elif path.is_symlink() or not path.is_file() or _checksum(path) != recorded[path]:
            found.append(f"{name} (changed since)")
    return found


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
