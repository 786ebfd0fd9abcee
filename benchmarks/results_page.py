"""Put the tables of bake-offs into docs/results.md, where its marks say which.

    python benchmarks/results_page.py

A mark is `<!-- table: FOLDER, TITLE -->`: the table under that title in
benchmarks/results/FOLDER/report.md, which `msplora bake-off` has written. Below a table of one that
is not over stands that it is not.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/results.md"
_NOT_OVER = "This bake-off is not over"
_MARK = re.compile(r"(<!-- table: ([\w-]+), ([\w ]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page with every marked table as its report has it."""

    def put(found: re.Match[str]) -> str:
        opening, folder, title, _, closing = found.groups()
        return f"{opening}{table(folder, title)}\n{closing}"

    return _MARK.sub(put, page)


def table(folder: str, title: str) -> str:
    """The table under a title of a bake-off's report.

    Raises:
        SystemExit: there is none.
    """
    report = ROOT / "benchmarks/results" / folder / "report.md"
    text = report.read_text(encoding="utf-8")
    section = text.partition(f"\n## {title}\n")[2].partition("\n## ")
    lines = [line for line in section[0].splitlines() if line.startswith("|")]
    if not lines:
        raise SystemExit(f"{report} has no table under {title!r}. Run msplora bake-off first.")
    return "\n".join([*lines, *_not_over(text)])


def _not_over(report: str) -> list[str]:
    """What a report says at its top of a bake-off that is not over, to stand below its table."""
    top = report.partition("\n## ")[0]
    return [line for its in top.splitlines() if its.startswith(_NOT_OVER) for line in ("", its)]


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
