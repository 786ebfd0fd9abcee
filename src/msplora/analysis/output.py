"""Where an analysis goes: a page, or a folder with the page and the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from msplora.folders import OutputError
from msplora.page.writing import check_files_free, check_page_free, write_files

if TYPE_CHECKING:
    from .results import Analysis

PAGE, NUMBERS = "analysis.html", "analysis.json"


def files_of(output: Path) -> list[Path]:
    """What is written for an output: the page alone, or the page and the numbers."""
    return [output] if _is_page(output) else [output / PAGE, output / NUMBERS]


def _is_page(output: Path) -> bool:
    return output.suffix.lower() in (".html", ".htm")


def check_free(output: Path, force: bool) -> None:
    """Refuse an output that is taken, before any work is done.

    Raises:
        OutputError: a file would be overwritten and `force` is not set, or the place cannot be
            written to.
    """
    if _is_page(output):
        check_page_free(output, force)
        return
    if output.suffix.lower() == ".json" and not output.is_dir():
        raise OutputError(
            f"the output {str(output)!r} is no page; --json prints the numbers. Give a page that "
            f"ends in .html, or a folder for the page and the numbers."
        )
    if output.exists() and not output.is_dir():
        raise OutputError(
            f"the output {str(output)!r} is a file; give a folder, or a page that ends in .html."
        )
    check_files_free(files_of(output), force)


def write(analysis: Analysis, output: Path, force: bool) -> list[Path]:
    """Write the files of an output.

    Raises:
        OutputError: as `check_free`, or the disk is full.
    """
    check_free(output, force)
    files = files_of(output)
    contents = [analysis.to_html(), analysis.to_json()]
    write_files(dict(zip(files, contents, strict=False)), output)
    return files
