"""Read the result files of the benchmarks, and refuse what a page cannot be written from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msplora.errors import MSPLoraError, nearest

Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """One file of one kind, with where its numbers come from."""

    name: str
    kind: str
    command: str
    commit: str
    hardware: str
    versions: dict[str, str]
    threads: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Field:
    """What a field may hold, and how an error calls that."""

    holds: Callable[[Any], bool]
    meaning: str


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_quartiles(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(_is_number(part) and part >= 0 for part in value)
        and value == sorted(value)
    )


def _is_measure(value: Any) -> bool:
    return _is_quartiles(value) or (_is_number(value) and value >= 0)


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(part, str) for part in value)
    )


TEXT = Field(lambda value: isinstance(value, str) and value != "", "text")
NAMES = Field(_is_names, "a name or a list of names")
COUNT = Field(lambda value: type(value) is int and value >= 0, "a whole number")
NUMBER = Field(_is_number, "a number")
CHECKPOINTING = Field(
    lambda value: isinstance(value, (bool, str)), "true, false, or the kind of checkpointing"
)
FLAG = Field(lambda value: isinstance(value, bool), "true or false")
QUARTILES = Field(_is_quartiles, "[lower quartile, median, upper quartile], in this order")
MEASURE = Field(_is_measure, "a number, or [lower quartile, median, upper quartile]")
# Null where a run had nothing to compare with.
RATIO = Field(lambda value: value is None or _is_measure(value), f"null, {MEASURE.meaning}")

MODEL = {"shape": TEXT, "layers": COUNT, "targets": NAMES}
STEP = {
    **MODEL,
    "dtype": TEXT,
    "batch": COUNT,
    "length": COUNT,
    "dropout": NUMBER,
    "checkpointing": CHECKPOINTING,
}
TIMES = {"method": TEXT, "rounds": COUNT, "seconds": QUARTILES, "to_floor": RATIO, "to_lora": RATIO}
GPU = dict.fromkeys(
    ("tokens_per_second", "peak_live_bytes", "step_live_bytes", "kernel_launches"), MEASURE
)

_KINDS: dict[str, dict[str, Field]] = {
    "speed": {**STEP, "compiled": FLAG, "trainable": COUNT, **TIMES},
    "memory": {
        **STEP,  # and, where a sweep had both, whether it is compiled
        "method": TEXT,
        "trainable": COUNT,
        "peak_live_bytes": COUNT,
        "step_live_bytes": COUNT,
        "resident_bytes": COUNT,
    },
    "sites": {"in": COUNT, "out": COUNT, "tokens": COUNT, "dtype": TEXT, **TIMES},
    "size": {"what": TEXT},
}
_SIZES: dict[str, dict[str, Field]] = {
    "inject": {**MODEL, "method": TEXT, "rounds": COUNT, "seconds": MEASURE, "to_lora": RATIO},
    "file": {
        "shape": TEXT,
        "targets": NAMES,
        "method": TEXT,
        "trainable": COUNT,
        "bytes": COUNT,
        "header_bytes": COUNT,
        "save_seconds": MEASURE,
        "load_seconds": MEASURE,
        "save_to_lora": RATIO,
        "load_to_lora": RATIO,
    },
    "singular values": {
        "shape": TEXT,
        "rank": COUNT,
        "method": TEXT,
        "seconds": MEASURE,
        "max_relative_difference": RATIO,
        "times_faster": RATIO,
    },
}
_ORIGIN = {
    "command": TEXT,
    "commit": TEXT,
    "hardware": TEXT,
    "versions": Field(lambda value: isinstance(value, dict) and bool(value), "names and versions"),
    "threads": COUNT,
    "rows": Field(lambda value: isinstance(value, list), "a list"),
}


def read_results(folder: Path) -> list[Results]:
    """Read every result file in `folder` that says its kind; other files there are not ours."""
    if not folder.is_dir():
        raise MSPLoraError(f"{folder} is not a folder; the results lie in benchmarks/results")
    found = [_read(file) for file in sorted(folder.glob("*.json"))]
    files = [file for file in found if file is not None]
    if not files:
        raise MSPLoraError(
            f'no file in {folder} is a result of `msplora bench`: a JSON object with a "kind" '
            f"({', '.join(_KINDS)})"
        )
    return files


def is_on_gpu(row: Row) -> bool:
    """Tell whether a row of a step was measured on a GPU, which alone has these fields."""
    return not GPU.keys().isdisjoint(row)


def _read(file: Path) -> Results | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MSPLoraError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict) or "kind" not in content:
        return None
    kind = content["kind"]
    if kind not in _KINDS:
        hint = nearest(str(kind), _KINDS)
        raise MSPLoraError(
            f"{file} has the unknown kind {kind!r}; known are {', '.join(_KINDS)}.{hint}"
        )
    _check(content, _ORIGIN, f"{file}:")
    if not content["rows"]:
        raise MSPLoraError(f"{file} has no rows; measure again, or remove it")
    for number, row in enumerate(content["rows"], start=1):
        _check_row(row, kind, f"{file}: row {number}")
    return Results(
        name=file.name,
        kind=kind,
        command=content["command"],
        commit=content["commit"],
        hardware=content["hardware"],
        versions={str(name): str(version) for name, version in content["versions"].items()},
        threads=content["threads"],
        rows=tuple(content["rows"]),
    )


def _check_row(row: Any, kind: str, where: str) -> None:
    if not isinstance(row, dict):
        raise MSPLoraError(f"{where} is {row!r}, not an object")
    _check(row, _KINDS[kind], where)
    if kind == "size":
        if row["what"] not in _SIZES:
            known = ", ".join(map(repr, _SIZES))
            raise MSPLoraError(f"{where} is about {row['what']!r}; known are {known}")
        _check(row, _SIZES[row["what"]], where)
    _check(row, {name: field for name, field in GPU.items() if name in row}, where)


def _check(values: Mapping[str, Any], fields: Mapping[str, Field], where: str) -> None:
    for name, field in fields.items():
        if name not in values:
            raise MSPLoraError(f"{where} has no {name!r} ({field.meaning})")
        if not field.holds(values[name]):
            raise MSPLoraError(
                f"{where} has {name!r} = {values[name]!r}; expected is {field.meaning}"
            )
