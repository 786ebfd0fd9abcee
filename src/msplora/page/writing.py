"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from msplora.folders import OutputError


def check_page_free(page: Path, force: bool) -> None:
    """Refuse a page whose place is taken, before any work is done.

    Raises:
        OutputError: a file would be overwritten and `force` is not set, or the place cannot be
            written to.
    """
    if page.is_dir():
        raise OutputError(f"the output {str(page)!r} is a folder; give another name for the page.")
    check_files_free([page], force)


def check_files_free(files: list[Path], force: bool) -> None:
    """The same of files that go into one folder."""
    taken = [file for file in files if file.exists()]
    if taken and not force:
        raise OutputError(
            f"there is {str(taken[0])!r} already. Choose another output, or pass --force to "
            f"replace it."
        )
    parent = files[0].absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"the folder {str(parent)!r} is not writable.")


def write_files(contents: dict[Path, str], output: Path) -> None:
    """Write each file beside its place and rename it; nothing is left half written.

    Raises:
        OutputError: the disk is full, or the place cannot be written to.
    """
    try:
        next(iter(contents)).parent.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            _write_whole(file, content)
    except OSError as error:
        raise OutputError(
            f"writing {str(output)!r} failed: {error}. Free some space or choose another place."
        ) from error


def _write_whole(file: Path, content: str) -> None:
    descriptor, beside = tempfile.mkstemp(prefix=f".{file.name}.partial-", dir=file.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as opened:
            opened.write(content)
        os.chmod(beside, 0o644)  # mkstemp's files are private
        os.replace(beside, file)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
