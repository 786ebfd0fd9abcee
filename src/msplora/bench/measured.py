"""What was measured at once, by all methods, and how a page calls it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from msplora.errors import MSPLoraError

from .reading import Results, Row

OURS, LORA, AGAIN, FLOOR = "msplora", "lora", "lora-again", "floor"

METHODS = {
    FLOOR: "floor (frozen model)",
    "full": "full fine-tuning",
    LORA: "LoRA",
    AGAIN: "LoRA again (A/A)",
    "lora-equal-rank": "LoRA, equal rank",
    "gralora": "GraLoRA",
    "vera": "VeRA",
    "branches": "one branch per level",
    OURS: "MSPLoRA",
    # of singular values
    "dense": "of the dense product",
    "factors": "of the factors",
}

_WORDS: dict[str, Callable[[Any], str]] = {
    "layers": lambda value: "1 layer" if value == 1 else f"{value} layers",
    "batch": lambda value: f"batch {value}",
    "length": lambda value: f"length {value}",
    "dropout": lambda value: f"dropout {value:g}" if value else "no dropout",
    "checkpointing": lambda value: f"{'no' if value == 'none' else value} checkpointing",
    "compiled": lambda value: "compiled" if value else "not compiled",
    "in": lambda value: f"{value:,} in",
    "out": lambda value: f"{value:,} out",
    "tokens": lambda value: f"{value:,} tokens",
    "rank": lambda value: f"rank {value}",
    "hardware": lambda value: f"on {value}",
}


@dataclass(frozen=True)
class Measured:
    """The methods' rows at one point of one file; ratios hold within it."""

    file: str
    keys: dict[str, Any]
    rows: dict[str, Row]

    def value(self, name: str) -> Any:
        """Return a key's value; the file counts as one."""
        return self.file if name == "file" else self.keys[name]

    def label(self, names: Iterable[str]) -> str:
        """Say what these keys are, as plain text."""
        return ", ".join(_WORDS.get(name, str)(self.value(name)) for name in names)

    def has(self, *methods: str) -> bool:
        """Tell whether all of these methods were measured here."""
        return all(method in self.rows for method in methods)


def gather(
    files: Iterable[Results],
    kind: str,
    keys: Iterable[str],
    wanted: Callable[[Row], bool] = lambda row: True,
) -> list[Measured]:
    """Group the wanted rows of a kind by file and keys; points come in the order of their keys.

    The hardware is the last of the keys: a page names it where a table's points differ in it.
    """
    names = tuple(keys)
    rows: dict[tuple[Any, ...], dict[str, Row]] = defaultdict(dict)
    for file in files:
        for row in file.rows if file.kind == kind else ():
            if not wanted(row):
                continue
            # Whether a step is compiled is not always told; then it is not.
            values = (_plain(name, row.get(name, False)) for name in names)
            place = (file.name, *values, file.hardware)
            if row["method"] in rows[place]:
                raise MSPLoraError(
                    f"{file.name} has two rows of method {row['method']!r} at the same point: "
                    + ", ".join(map(str, place[1:]))
                )
            rows[place][row["method"]] = row
    points = [
        Measured(file, dict(zip((*names, "hardware"), values, strict=True)), found)
        for (file, *values), found in rows.items()
    ]
    return sorted(points, key=lambda point: [*map(_order, point.keys.values()), point.file])


def varying(points: Sequence[Measured]) -> list[str]:
    """Name the keys that tell these points apart; the file, only where nothing else does."""
    if not points:
        return []
    names = [name for name in points[0].keys if len({p.keys[name] for p in points}) > 1]
    places = {tuple(point.keys.values()) for point in points}
    return names if len(places) == len(points) else [*names, "file"]


def constant(points: Sequence[Measured]) -> str:
    """Say what is the same at all of these points."""
    if not points:
        return ""
    differs = set(varying(points))
    return points[0].label(name for name in points[0].keys if name not in differs)


def labels(points: Sequence[Measured]) -> list[str]:
    """Name each point by what tells it from the others; a lone one by all its keys."""
    names = varying(points)
    return [point.label(names or point.keys) for point in points]


def main_point(points: Iterable[Measured]) -> Measured | None:
    """Find where most methods were measured; then, where most often; then the first."""

    def weight(point: Measured) -> tuple[int, int]:
        return len(point.rows), min(row.get("rounds", 0) for row in point.rows.values())

    return max(points, key=weight, default=None)


def depth_series(points: Sequence[Measured]) -> list[Measured]:
    """Find the longest series of points that differ in depth alone; empty if it is no series."""
    series: dict[tuple[Any, ...], dict[int, Measured]] = defaultdict(dict)
    for point in points:
        if all(point.rows.get(method, {}).get("to_lora") for method in (OURS, AGAIN)):
            rest = tuple(value for name, value in point.keys.items() if name != "layers")
            series[rest].setdefault(point.keys["layers"], point)
    longest = max(series.values(), key=len, default={})
    return [longest[layers] for layers in sorted(longest)] if len(longest) > 2 else []


def method_order(points: Sequence[Measured]) -> list[str]:
    """List the methods measured at these points, ours last, those without a name before it."""
    found = dict.fromkeys(method for point in points for method in point.rows)
    known = list(METHODS)
    return sorted(
        found, key=lambda m: (m == OURS, known.index(m) if m in METHODS else len(known), m)
    )


def others(points: Sequence[Measured]) -> list[str]:
    """List the methods measured here beside ours, LoRA, its control and the floor."""
    return [name for name in method_order(points) if name not in (FLOOR, LORA, AGAIN, OURS)]


def method_name(method: str) -> str:
    """Call a method as the page does; one without a name there, as its file does."""
    return METHODS.get(method, method)


def _plain(name: str, value: Any) -> Any:
    """Make a key of a value: a list of targets one text, checkpointing a word."""
    if name == "checkpointing" and isinstance(value, bool):
        return "gradient" if value else "none"
    return ", ".join(value) if isinstance(value, list) else value


def _order(value: Any) -> tuple[bool, float, str]:
    """Sort numbers as numbers, and nothing special before what is."""
    if value == "none":
        return True, 0.0, ""
    is_text = isinstance(value, str)
    return is_text, 0.0 if is_text else float(value), str(value)
