"""Tables of the page: how a number is rounded, what counts as slower, how a name is written.

No rounding favours us: what is better when small is rounded up for MSPLoRA and down for every
other method, what is better when large the other way round. Verdicts and shares are computed from
the unrounded numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from enum import Enum
from typing import Any

from .measured import AGAIN, LORA, METHODS, OURS, Measured, method_name, method_order, varying

MIN_ROUNDS = 60  # below this a point is shown, and judged by nobody
NOTHING = "–"
_OURS = frozenset({OURS, "factors"})  # singular values of the factors are what this library offers

Column = tuple[str, Callable[[Measured, str], str]]


class Verdict(Enum):
    """MSPLoRA's step against LoRA's at one point."""

    FASTER = "faster"
    LEVEL = "inside the A/A spread"
    SLOWER = "slower"
    UNJUDGED = "not judged"


def slower_beyond_spread(ours: Sequence[float], again: Sequence[float]) -> bool:
    """Tell whether our median lies above 1 and above the A/A control's upper quartile."""
    return ours[1] > max(1.0, again[2])


def faster_beyond_spread(ours: Sequence[float], again: Sequence[float]) -> bool:
    """Tell whether our median lies below 1 and below the A/A control's lower quartile."""
    return ours[1] < min(1.0, again[0])


def unjudged(point: Measured) -> str:
    """Say why a point cannot be judged; empty if it can."""
    for method in (OURS, LORA, AGAIN):
        if method not in point.rows:
            return f"no {method_name(method)}"
        if quartiles(point.rows[method]["to_lora"]) is None:
            return f"{method_name(method)} has no ratio to LoRA"
    rounds = min(point.rows[method]["rounds"] for method in (OURS, LORA, AGAIN))
    return f"{rounds} rounds" if rounds < MIN_ROUNDS else ""


def verdict(point: Measured) -> Verdict:
    """Judge a point."""
    if unjudged(point):
        return Verdict.UNJUDGED
    ours, again = (point.rows[method]["to_lora"] for method in (OURS, AGAIN))
    if slower_beyond_spread(ours, again):
        return Verdict.SLOWER
    return Verdict.FASTER if faster_beyond_spread(ours, again) else Verdict.LEVEL


def overhead_share(point: Measured, method: str = OURS) -> Decimal | None:
    """Return what the method's median adds to the floor, as a share of what LoRA's adds.

    There is none where LoRA adds no more than it is from itself: that would divide by noise.
    """
    if not point.has(method, LORA):
        return None
    found = (quartiles(point.rows[name]["to_floor"]) for name in (method, LORA))
    theirs, loras = (None if value is None else exact(value[1]) - 1 for value in found)
    control = quartiles(point.rows.get(AGAIN, {}).get("to_lora"))
    least = exact(control[2]) - 1 if control is not None else Decimal(0)
    if theirs is None or loras is None or loras <= max(least, Decimal(0)):
        return None
    return theirs / loras


def quartiles(value: Any) -> Sequence[float] | None:
    """Return three quartiles of a measure; a lone number is all three."""
    return value if value is None or isinstance(value, list) else [value] * 3


def exact(value: float | Decimal) -> Decimal:
    """Return the number as its file has it: 1.1 is 1.1, not the nearest binary fraction."""
    return value if isinstance(value, Decimal) else Decimal(repr(value))


def rounded(
    value: float | Decimal, digits: int, method: str, *, large_is_good: bool = False
) -> str:
    """Write a number so that its rounding does not favour us."""
    up = (method in _OURS) != large_is_good
    step = Decimal(1).scaleb(-digits)
    return f"{exact(value).quantize(step, ROUND_CEILING if up else ROUND_FLOOR):,f}"


def spread(value: Any, digits: int, method: str, per: float = 1, **how: bool) -> str:
    """Write a median with its quartiles, or the lone number that there is, in units of `per`."""
    if value is None:
        return NOTHING
    parts = value if isinstance(value, list) else [value]
    shown = [rounded(exact(part) / exact(per), digits, method, **how) for part in parts]
    return shown[0] if len(shown) == 1 else f"{shown[1]} ({shown[0]} to {shown[2]})"


def percent(share: Decimal | None, method: str) -> str:
    """Write a share."""
    return NOTHING if share is None else f"{rounded(share * 100, 1, method)}%"


def escape(text: str) -> str:
    """Write text that comes from a file so that Markdown takes none of it for its own."""
    text = " ".join(text.split()).replace("\\", "\\\\")
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"[|`*\[\]~]", r"\\\g<0>", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # within a word it means nothing


@dataclass(frozen=True)
class Table:
    """A Markdown table; its first `names` columns are names, the others numbers."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1

    def __str__(self) -> str:
        rules = ["---" if place < self.names else "---:" for place in range(len(self.headers))]
        lines = [self.headers, rules, *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparison(points: Sequence[Measured], extra: Sequence[str] = ()) -> Table:
    """Compare ours with LoRA, a line for each point; `extra` methods get one column each."""
    keys = varying(points)
    headers = [
        *keys,
        "LoRA ÷ floor",
        "MSPLoRA ÷ floor",
        "its share of LoRA's overhead",
        "LoRA again's share",
        "MSPLoRA ÷ LoRA",
        "LoRA again ÷ LoRA",
        *(f"{escape(method_name(name))} ÷ LoRA" for name in extra),
        "MSPLoRA is",
    ]
    rows = [
        [
            *(key_cell(point, name) for name in keys),
            _ratio(point, LORA, "to_floor"),
            _ratio(point, OURS, "to_floor"),
            percent(overhead_share(point), OURS),
            percent(overhead_share(point, AGAIN), AGAIN),
            _ratio(point, OURS, "to_lora"),
            _ratio(point, AGAIN, "to_lora"),
            *(_ratio(point, name, "to_lora") for name in extra),
            _verdict_cell(point),
        ]
        for point in points
    ]
    return Table(headers, rows, len(keys))


def by_method(
    points: Sequence[Measured], columns: Iterable[Column], keys: Sequence[str] | None = None
) -> Table:
    """Show every method, a line for each at each point, in the columns that have a number."""
    keys = varying(points) if keys is None else keys
    places = [(point, method) for point in points for method in method_order([point])]
    rows = [
        [
            *(key_cell(point, name) for name in keys),
            f"**{METHODS[method]}**" if method in _OURS else escape(method_name(method)),
        ]
        for point, method in places
    ]
    headers = [*keys, "method"]
    for header, column in columns:
        cells = [column(point, method) for point, method in places]
        if set(cells) != {NOTHING}:
            headers.append(header)
            rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
    return Table(headers, rows, len(keys) + 1)


def measure(
    header: str, field: str, digits: int, per: float = 1, *, large_is_good: bool = False
) -> Column:
    """Make a column of one field's numbers; a row without the field gets a dash."""

    def cell(point: Measured, method: str) -> str:
        value = point.rows[method].get(field)
        return spread(value, digits, method, per, large_is_good=large_is_good)

    return header, cell


def to_lora(header: str, field: str) -> Column:
    """Make a column of a field's ratio to LoRA's, for fields whose rows hold none."""

    def cell(point: Measured, method: str) -> str:
        share = ratio_to_lora(point, method, field)
        return NOTHING if share is None else rounded(share, 3, method)

    return header, cell


def ratio_to_lora(point: Measured, method: str, field: str) -> Decimal | None:
    """Divide a method's number by LoRA's at the same point."""
    if not point.has(method, LORA) or not point.rows[LORA].get(field):
        return None
    return exact(point.rows[method][field]) / exact(point.rows[LORA][field])


def key_cell(point: Measured, name: str) -> str:
    """Write a key's value in a table, under its name."""
    value = point.value(name)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return escape(value) if isinstance(value, str) else f"{value:,}"


def _ratio(point: Measured, method: str, field: str) -> str:
    return spread(point.rows.get(method, {}).get(field), 3, method)


def _verdict_cell(point: Measured) -> str:
    found = verdict(point)
    if found is Verdict.UNJUDGED:
        return f"{found.value}: {escape(unjudged(point))}"
    return f"**{found.value}**" if found is Verdict.SLOWER else found.value
