"""A bake-off's tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.markup import escape
from rich.table import Table

from .bake_off import Outcome
from .tables import tables


def rich_tables(outcome: Outcome) -> Iterator[Table]:
    """The tables, to be printed one after the other."""
    for its in tables(outcome):
        table = Table(
            title=its.title,
            title_justify="left",
            title_style="bold",
            caption=its.note or None,
            caption_justify="left",
            box=box.SIMPLE,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        columns = its.brief or range(len(its.headers))
        for place in columns:
            is_number = place >= its.words
            table.add_column(escape(its.headers[place]), justify="right" if is_number else "left")
        for line in its.lines:
            table.add_row(*(escape(line[place]) for place in columns))
        yield table
