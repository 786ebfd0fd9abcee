"""The rows of `msplora bench size` as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from .results import Row


def size_table(rows: Sequence[Row], title: str) -> Table:
    """One point's rows."""
    return _TABLES[rows[0]["what"]](rows, title)


def _inject(rows: Sequence[Row], title: str) -> Table:
    table = _table(title, "method", "ms", "to LoRA")
    for row in rows:
        table.add_row(row["method"], _milliseconds(row["seconds"]), _spread(row["to_lora"]))
    return table


def _file(rows: Sequence[Row], title: str) -> Table:
    # The medians only: their quartiles do not fit beside them.
    headers = ("trainable", "bytes", "header", "save, ms", "to LoRA", "load, ms", "to LoRA")
    table = _table(title, "method", *headers)
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['trainable']:,}",
            f"{row['bytes']:,}",
            f"{row['header_bytes']:,}",
            _milliseconds(row["save_seconds"]),
            f"{row['save_to_lora'][1]:.3f}",
            _milliseconds(row["load_seconds"]),
            f"{row['load_to_lora'][1]:.3f}",
        )
    return table


def _values(rows: Sequence[Row], title: str) -> Table:
    table = _table(title, "from", "ms", "times as fast", "relative difference")
    for row in rows:
        off, faster = row["max_relative_difference"], row["times_faster"]
        table.add_row(
            row["method"],
            _milliseconds(row["seconds"]),
            "–" if faster is None else "{1:.0f} ({0:.0f}–{2:.0f})".format(*faster),
            "–" if off is None else f"{off:.1e}",
        )
    return table


_TABLES: dict[str, Any] = {"inject": _inject, "file": _file, "singular values": _values}


def _milliseconds(quartiles: Sequence[float]) -> str:
    return f"{1000 * quartiles[1]:,.2f}"


def _spread(quartiles: Sequence[float]) -> str:
    return "{1:.3f} ({0:.3f}–{2:.3f})".format(*quartiles)


def _table(title: str, *headers: str) -> Table:
    how: dict[str, Any] = {"box": box.SIMPLE, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title=title, title_justify="left", **how)
    for place, header in enumerate(headers):
        table.add_column(header, justify="right" if place else "left", no_wrap=not place)
    return table
