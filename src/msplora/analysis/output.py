"""Where an analysis goes: a page, or a folder with the page and the numbers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from msplora.folders import OutputError

if TYPE_CHECKING:
    from .results import Analysis

PAGE, NUMBERS = "analysis.html", "analysis.json"


def files_of(output: Path) -> list[Path]:
    """What is written for an output: the page alone, or the page and the numbers."""
    return [output] if output.suffix == ".html" else [output / PAGE, output / NUMBERS]


def check_free(output: Path, force: bool) -> None:
    """Refuse an output that is taken, before any work is done.

    Raises:
        OutputError: a file would be overwritten and `force` is not set, or the place cannot be
            written to.
    """
    is_page = output.suffix == ".html"
    if is_page and output.is_dir():
        raise OutputError(
            f"the output {str(output)!r} is a folder; give another name for the page."
        )
    if not is_page and output.exists() and not output.is_dir():
        raise OutputError(
            f"the output {str(output)!r} is a file; give a folder, or a page that ends in .html."
        )
    taken = [file for file in files_of(output) if file.exists()]
    if taken and not force:
        raise OutputError(
            f"there is {str(taken[0])!r} already. Choose another output, or pass --force to "
            f"replace it."
        )
    parent = files_of(output.absolute())[0].parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"the folder {str(parent)!r} is not writable.")


def write(analysis: Analysis, output: Path, force: bool) -> list[Path]:
    """Write each file beside its place and rename it; nothing is left half written.

    Raises:
        OutputError: as `check_free`, or the disk is full.
    """
    check_free(output, force)
    files = files_of(output)
    contents = [analysis.to_html(), analysis.to_json()]
    try:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for file, content in zip(files, contents, strict=False):
            _write_whole(file, content)
    except OSError as error:
        raise OutputError(
            f"writing {str(output)!r} failed: {error}. Free some space or choose another place."
        ) from error
    return files


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
