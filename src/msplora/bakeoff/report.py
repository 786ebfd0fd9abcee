"""The report of a bake-off: one HTML page that needs no other, and the same as Markdown."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msplora.page.environment import environment
from msplora.page.writing import write_files
from msplora.sweep.folder import SweepFolderError

from .bake_off import Outcome
from .origins import origins
from .plots import draw_differences, draw_front, draw_rates
from .protocol import protocol
from .statistics import standings
from .tables import Table, tables

PAGE, TEXT = "report.html", "report.md"
NOT_OVER = "This bake-off is not over: runs are missing, and rates may still be chosen otherwise."


def write_report(outcome: Outcome) -> Path:
    """Write the page, the Markdown and the plots into the folder of the bake-off; return the page.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to.
        SweepFolderError: no run was begun; a report alone would make the folder seem taken.
    """
    folder = outcome.prepared.bake_off.output
    if not outcome.rows:
        raise SweepFolderError(
            f"there is nothing to report: no run of the bake-off in {folder} was begun. Start it "
            f"without --report-only first; --list shows what is known before."
        )
    plots = draw(outcome)
    files = {folder / PAGE: page(outcome, plots), folder / TEXT: markdown(outcome, plots)}
    files |= {folder / f"{name}.svg": its.decode() for name, its in plots.items()}
    write_files(files, folder)
    return folder / PAGE


def state(outcome: Outcome) -> str:
    """What is wrong with a bake-off as a whole; nothing where all its runs were made."""
    used = outcome.used
    failed = sum(row.status == "failed" for row in used)
    is_any_complete = any(row and row.status == "complete" for row in outcome.finals.values())
    said = [] if outcome.is_over else [NOT_OVER]
    if failed:
        said.append(f"{failed} of {len(used)} runs failed; --retry-failed runs them again.")
    if outcome.is_over and not is_any_complete:
        said.append("No run that counts is complete.")
    return " ".join(said)


def draw(outcome: Outcome) -> dict[str, bytes]:
    """Name -> plot, as SVG; only those with something to show."""
    found = standings(outcome)
    plots = {}
    if any(its.overall for its in found):
        plots["front"] = draw_front(outcome, found)
    if any(its.against for its in found):
        plots["differences"] = draw_differences(outcome, found)
    if any(choice.tried for choice in outcome.choices.values()):
        plots["rates"] = draw_rates(outcome)
    return plots


_CAPTIONS = {
    "front": "Score against size, with the standard deviation of the seeds",
    "differences": "Each method against the baseline, on the same tasks with the same seeds",
    "rates": "What each learning rate gave where rates are chosen; rings mark the chosen ones",
}


_IN_WORDS = {
    "front": "The table has the numbers.",
    "differences": "The table has the mean and the lowest and highest pair; the file of results "
    "has each pair's.",
    "rates": "The table has the numbers.",
}
"""Where those who do not see a plot find what it shows."""


def page(outcome: Outcome, plots: Mapping[str, bytes]) -> str:
    """The HTML page.

    Raises:
        MSPLoraError: jinja2 is not installed.
    """
    bake_off = outcome.prepared.bake_off
    return (
        environment("msplora.bakeoff")
        .get_template("page.html.j2")
        .render(
            bake_off=bake_off,
            chooses=any(len(its.rates) > 1 for its in bake_off.entrants.values()),
            tables=tables(outcome),
            # As images: their identifiers would clash in one document.
            plots={name: base64.b64encode(its).decode() for name, its in plots.items()},
            captions=_CAPTIONS,
            in_words=_IN_WORDS,
            not_over=state(outcome),
            protocol=protocol(outcome),
            origins=origins(outcome),
        )
    )


def markdown(outcome: Outcome, plots: Mapping[str, Any]) -> str:
    """The same as Markdown, with its plots beside it."""
    parts = ["# Bake-off"]
    if said := state(outcome):
        parts.append(said)
    parts += [f"![{_CAPTIONS[name]}]({name}.svg)" for name in plots if name != "rates"]
    for table in tables(outcome):
        parts += [f"## {table.title}", _markdown_table(table)]
        if table.title == "Learning rates" and "rates" in plots:
            parts.append(f"![{_CAPTIONS['rates']}](rates.svg)")
        if table.note:
            parts.append(table.note)
    parts += ["## Protocol", _markdown_list(protocol(outcome))]
    parts += ["## Where the figures are from", _markdown_list(origins(outcome))]
    return "\n\n".join(parts) + "\n"


def _markdown_list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_cell(line)}" for line in lines)


def _markdown_table(table: Table) -> str:
    ruler = ["---" if place < table.words else "---:" for place in range(len(table.headers))]
    lines = [table.headers, ruler, *table.lines]
    return "\n".join(f"| {' | '.join(_cell(its) for its in line)} |" for line in lines)


def _cell(text: str) -> str:
    """Words that come from files, so that none of them is read as Markdown."""
    return " ".join(re.sub(r"([|*\[\]`])", r"\\\1", text.replace("<", "&lt;")).split())
