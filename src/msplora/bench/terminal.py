"""Rows as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .methods import CONTROL
from .results import Row
from .tables import MIN_ROUNDS, faster_beyond_spread, slower_beyond_spread

if TYPE_CHECKING:
    from rich.table import Table


def time_table(rows: Sequence[Row], title: str) -> Table:
    """One point's times: ratios with their quartiles, and what they say of LoRA."""
    table = _table(title, ("method", "ms", "to the floor", "of LoRA's overhead", "to LoRA", ""))
    table.caption, table.caption_justify = caption(rows), "left"
    on_gpu = "tokens_per_second" in rows[0]
    for header in ("tokens/s", "peak MiB", "kernels") if on_gpu else ():
        table.add_column(header, justify="right", no_wrap=True)
    lora = next(row for row in rows if row["method"] == "lora")
    control = _control(rows)
    for row in rows:
        share = share_of_overhead(row["to_floor"][1], lora["to_floor"][1])
        cells = [
            f"{1000 * row['seconds'][1]:#.4g}".rstrip("."),
            _spread(row["to_floor"]),
            "–" if share is None or row["method"] == "floor" else f"{share:.2f}",
            _spread(row["to_lora"]),
            verdict(row, control),
        ]
        if on_gpu:
            cells += [
                f"{row['tokens_per_second']:,.0f}",
                f"{row['peak_live_bytes'] / 2**20:,.0f}",
                f"{row['kernel_launches']:,}" if "kernel_launches" in row else "–",
            ]
        table.add_row(row["method"], *cells)
    return table


def memory_table(rows: Sequence[Row], title: str) -> Table:
    """One point's memory."""
    headers = ("method", "trainable", "peak live MiB", "the step's", "to the floor", "resident MiB")
    table = _table(title, headers)
    floor = next((row["step_live_bytes"] for row in rows if row["method"] == "floor"), None)
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['trainable']:,}",
            f"{row['peak_live_bytes'] / 2**20:,.1f}",
            f"{row['step_live_bytes'] / 2**20:,.1f}",
            f"{row['step_live_bytes'] / floor:.3f}" if floor else "–",
            f"{row['resident_bytes'] / 2**20:,.0f}",
        )
    return table


def caption(rows: Sequence[Row]) -> str:
    """How far LoRA is from itself, and whether there were rounds enough to claim anything."""
    control = _control(rows)
    rounds = rows[0]["rounds"]
    if control is None:
        said = f"No {CONTROL}: nothing says how far LoRA is from itself."
    else:
        said = f"LoRA to itself (A/A): {_spread(control)}; inside it no step tells two apart."
    few = f" Fewer than {MIN_ROUNDS} rounds are no claim." if rounds < MIN_ROUNDS else ""
    return f"{rounds} round{'s' * (rounds != 1)}; median (quartiles). {said}{few}"


def verdict(row: Row, control: Sequence[float] | None) -> str:
    """What a method's ratio to LoRA says, given LoRA's to itself."""
    if control is None or row["method"] in ("floor", "lora", CONTROL):
        return ""
    if slower_beyond_spread(row["to_lora"], control):
        return "slower"
    if faster_beyond_spread(row["to_lora"], control):
        return "faster"
    return "within A/A"


def share_of_overhead(to_floor: float, lora_to_floor: float) -> float | None:
    """A method's overhead over the floor, as a fraction of LoRA's; None where LoRA has none."""
    return (to_floor - 1) / (lora_to_floor - 1) if lora_to_floor > 1 else None


def _control(rows: Sequence[Row]) -> Sequence[float] | None:
    return next((row["to_lora"] for row in rows if row["method"] == CONTROL), None)


def _spread(quartiles: Sequence[float]) -> str:
    low, median, high = quartiles
    return f"{median:.3f} ({low:.3f}–{high:.3f})"


def _table(title: str, headers: Sequence[str]) -> Table:
    """Names to the left, numbers to the right; where a terminal is narrow, quartiles wrap."""
    from rich import box
    from rich.table import Table

    how = {"box": box.SIMPLE, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title=title, title_justify="left", **how)
    for place, header in enumerate(headers):
        is_text = place == 0 or not header
        table.add_column(header, justify="left" if is_text else "right", no_wrap=is_text)
    return table
