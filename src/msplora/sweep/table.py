"""The settings of a sweep as a table, the best first: for the terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from msplora.train.checkpoints import write_whole

from .best import marked, not_comparable
from .naming import short_keys, shown
from .reading import Sweep
from .settings_tried import Setting, rank

if TYPE_CHECKING:
    from rich.table import Table

TABLE = "table"
"""The name of both files, before .md and .csv."""


def write_tables(sweep: Sweep, settings: Sequence[Setting], folder: Path) -> None:
    """Write table.md, to be read, and table.csv, with every digit."""
    write_whole(folder / f"{TABLE}.md", _markdown(sweep, settings))
    write_whole(folder / f"{TABLE}.csv", _csv(sweep, settings))


def rich_table(sweep: Sweep, settings: Sequence[Setting]) -> Table:
    """The table for the terminal."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    how = {"box": box.SIMPLE, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(caption=_caption(sweep, settings), caption_justify="left", **how)
    headers, lines = _cells(sweep, settings)
    for place, header in enumerate(headers):
        is_last = place == len(headers) - 1
        is_number = len(sweep.swept) <= place and not is_last
        table.add_column(
            escape(header), justify="right" if is_number else "left", no_wrap=is_number
        )
    for cells in lines:
        best = cells[-1].startswith("best")
        table.add_row(*(escape(cell) for cell in cells), style="bold" if best else "")
    return table


def _cells(sweep: Sweep, settings: Sequence[Setting]) -> tuple[list[str], list[list[str]]]:
    short = short_keys(sweep.swept)
    headers = [*short.values(), _metric(settings), "trainable", "seconds", ""]
    marks = _marks(settings)
    lines = []
    for place in sorted(range(len(settings)), key=lambda its: rank(settings[its])):
        setting = settings[place]
        trainable = {f"{row.trainable:,}" for row in setting.complete}
        notes = [marks.get(place, ""), _what_is_missing(setting)]
        lines.append(
            [
                *(shown(setting.parameters[key]) for key in short),
                _spread(setting.values),
                " or ".join(sorted(trainable)) or "–",
                f"{mean(row.seconds for row in setting.complete):,.0f}" if setting.values else "–",
                "; ".join(filter(None, notes)),
            ]
        )
    return headers, lines


def _marks(settings: Sequence[Setting]) -> dict[int, str]:
    """Place of a setting -> what it is best of."""
    bests = marked(list(settings))
    return {
        place: what
        for place, setting in enumerate(settings)
        for its, what in bests
        if setting is its
    }


def _what_is_missing(setting: Setting) -> str:
    missing = {
        status: len(setting.having(status)) for status in ("diverged", "failed", "unfinished")
    }
    missing["not run"] = sum(row is None for row in setting.rows.values())
    of = f" of {len(setting.rows)}" if len(setting.rows) > 1 else ""
    return ", ".join(
        f"{count}{of} {status}" if of else status for status, count in missing.items() if count
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def _metric(settings: Sequence[Setting]) -> str:
    """What the settings are judged by, once a run says it."""
    return next((str(row.metric) for its in settings for row in its.complete), "metric")


def _caption(sweep: Sweep, settings: Sequence[Setting]) -> str:
    said = f"{_metric(settings)} on the held-out rows, of the checkpoint that was kept"
    seeds = sweep.settings.seeds or []
    if len(seeds) > 1:
        said += f"; mean of {len(seeds)} seeds (lowest to highest)"
    if any(setting.having("diverged") for setting in settings):
        said += ". A setting that diverged with a seed is not among the best"
    why_not = not_comparable(list(settings))
    if why_not:
        said += f". Its settings were {why_not}; best is marked among those scored alike"
    return f"{said}. Seconds are those of one run, loading included."


def _markdown(sweep: Sweep, settings: Sequence[Setting]) -> str:
    headers, lines = _cells(sweep, settings)
    ruler = [
        "---:" if len(sweep.swept) <= place < len(headers) - 1 else "---"
        for place in range(len(headers))
    ]
    rows = [headers, ruler, *([cell.replace("|", r"\|") for cell in line] for line in lines)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\n{_caption(sweep, settings)}\n"


def _csv(sweep: Sweep, settings: Sequence[Setting]) -> str:
    """One line per setting; the runs themselves are the lines of results.jsonl."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    judged = ("metric", "mean", "lowest", "highest", "runs", "diverged", "failed")
    writer.writerow([*sweep.swept, *judged, "trainable", "seconds", "mark"])
    marks = _marks(settings)
    for place in sorted(range(len(settings)), key=lambda its: rank(settings[its])):
        setting = settings[place]
        values, complete = setting.values, setting.complete
        writer.writerow(
            [
                *(shown(setting.parameters[key]) for key in sweep.swept),
                _metric(settings),
                *((mean(values), min(values), max(values)) if values else ("", "", "")),
                len(values),
                len(setting.having("diverged")),
                len(setting.having("failed")),
                complete[0].trainable if complete else "",
                mean(row.seconds for row in complete) if complete else "",
                marks.get(place, ""),
            ]
        )
    return file.getvalue()
