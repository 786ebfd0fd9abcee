"""Line charts as numbers: what the page's template draws, and the table that stands behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from .results import Number

WIDTH, HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 10, 34
_MOST_COLUMNS = 8
"""A chart of more lines has a table with one row per line."""
_COLOURS = 5
_DECADES = 8
"""A logarithmic axis reaches no further down than this from its largest value."""


def style_of(place: int) -> str:
    """The style of the line at a place; no two of the first ten are alike."""
    return f"c{place % _COLOURS}{' again' * (place >= _COLOURS)}"


@dataclass(frozen=True)
class Series:
    """One line: a value for each place on the x-axis."""

    name: str
    values: Sequence[Number]
    style: str = "c0"
    """Its classes in the style sheet: c0 … c4 are colours with dashes of their own, `again` is a
    second turn of them, ref is a line to compare with, and `chance` what a colour's would be by
    chance."""
    shade: float | None = None
    """From 0 to 1: a place between two colours, for lines that are in an order."""


@dataclass(frozen=True)
class Line:
    """A drawn line: its stretches, and its single points, which no line shows."""

    name: str
    style: str
    shade: float | None
    paths: tuple[str, ...]
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart ready to be drawn."""

    title: str
    x_label: str
    y_label: str
    description: str
    """What one who does not see it should know."""
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    bottom: int = HEIGHT - _BOTTOM
    right: int = WIDTH - _RIGHT
    top: int = _TOP


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    x: Sequence[int],
    series: Sequence[Series],
    *,
    log: bool = False,
    share: bool = False,
    beside: Iterable[Number] = (),
) -> Chart:
    """Lay out a chart.

    Args:
        title: what it shows.
        x_label: of the axis, and of the table's first column.
        y_label: of the other axis.
        x: whole numbers, rising.
        series: the lines; None is a gap.
        log: a logarithmic y-axis, on which zero and what is far below the rest is a gap.
        share: values are shares: the axis is in percent, and reaches from 0 (or the lowest) to 1.
        beside: values of charts that stand beside this one, whose axis is the same.
    """
    values = chain(beside, *(one.values for one in series))
    found = [its for its in values if its is not None]
    low, high = _range(found, log, share)
    span = math.log10(high / low) if log else high - low
    x_low, x_high = (x[0], x[-1]) if x else (0, 1)

    def across(value: float) -> float:
        part = (value - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return round(_LEFT + part * (WIDTH - _LEFT - _RIGHT), 1)

    def up(value: float) -> float:
        part = (math.log10(value / low) if log else value - low) / span
        return round(HEIGHT - _BOTTOM - part * (HEIGHT - _TOP - _BOTTOM), 1)

    lines = []
    for one in series:
        points = [
            None if value is None or (log and value < low) else (across(at), up(value))
            for at, value in zip(x, one.values, strict=False)
        ]
        paths, dots = _stretches(points)
        lines.append(Line(one.name, one.style, one.shade, paths, dots))
    header, rows = _table(x_label, x, series, share)
    return Chart(
        title,
        x_label,
        y_label,
        _description(series, share),
        tuple(lines),
        tuple(Tick(across(its), str(its)) for its in _whole_ticks(x_low, x_high)),
        tuple(
            Tick(up(its), shown(its, share)) for its in (_log_ticks if log else _ticks)(low, high)
        ),
        header,
        rows,
    )


def shown(value: Number, share: bool = False) -> str:
    """A number as the page writes it; a dash where it has no meaning."""
    if value is None:
        return "–"
    if share:
        return f"{value:.0%}" if round(value * 100, 1) == round(value * 100) else f"{value:.1%}"
    return f"{value:.3g}"


def _range(found: Sequence[float], log: bool, share: bool) -> tuple[float, float]:
    if share:
        return min([0.0, *found]), max([1.0, *found])
    if log:
        positive = [its for its in found if its > 0]
        high = max(positive, default=1.0)
        low = min((its for its in positive if its > high / 10**_DECADES), default=high / 10)
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high) - 1e-9)
        return 10.0**first, 10.0 ** max(last, first + 1)
    low, high = min([0.0, *found]), max([0.0, *found])
    step = _step(low, high)
    return math.floor(low / step + 1e-9) * step, max(math.ceil(high / step - 1e-9), 1) * step


def _stretches(
    points: Sequence[tuple[float, float] | None],
) -> tuple[tuple[str, ...], tuple[tuple[float, float], ...]]:
    stretches: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            stretches.append([])
        else:
            stretches[-1].append(point)
    paths = tuple(" ".join(f"{x},{y}" for x, y in its) for its in stretches if len(its) > 1)
    return paths, tuple(its[0] for its in stretches if len(its) == 1)


def _step(low: float, high: float) -> float:
    """A round step that gives about four marks."""
    rough = (high - low) / 4 or 0.25
    power = 10.0 ** math.floor(math.log10(rough))
    return next((its * power for its in (1, 2, 5) if its * power >= rough), 10 * power)


def _ticks(low: float, high: float) -> list[float]:
    step = _step(low, high)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [its * step for its in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = round(math.log10(low)), round(math.log10(high))
    every = max(1, math.ceil((last - first) / 4))
    return [10.0**its for its in range(first, last + 1, every)]


def _whole_ticks(low: int, high: int) -> list[int]:
    step = max(1, math.ceil(_step(low, high)))
    round_ones = list(range(math.ceil(low / step) * step, high + 1, step))
    # The first place is marked too, where there is room for it: 1, 5, 10 …
    return round_ones if not round_ones or round_ones[0] - low <= step / 3 else [low, *round_ones]


def _table(
    x_label: str, x: Sequence[int], series: Sequence[Series], share: bool
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    if len(series) > _MOST_COLUMNS:
        header = (f"↓ line, → {x_label}", *map(str, x))
        return header, tuple(
            (one.name, *(shown(value, share) for value in one.values)) for one in series
        )
    columns = [list(one.values) + [None] * (len(x) - len(one.values)) for one in series]
    return (x_label, *(one.name for one in series)), tuple(
        (str(at), *(shown(column[place], share) for column in columns))
        for place, at in enumerate(x)
    )


def _description(series: Sequence[Series], share: bool) -> str:
    """The range of each line in words, for the few; of all together, for the many."""
    if len(series) > _MOST_COLUMNS:
        found = [its for one in series for its in one.values if its is not None]
        series = [Series(f"{len(series)} lines", found)]
    said = []
    for one in series:
        found = [its for its in one.values if its is not None]
        if found:
            said.append(f"{one.name}: {shown(min(found), share)} to {shown(max(found), share)}")
        else:
            said.append(f"{one.name}: nothing to show")
    return "; ".join(said) + "."
