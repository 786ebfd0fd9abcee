"""What runs and their parameters are called in folders, tables and plots."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

_LONGEST = 120  # bytes: file systems take 255, and `.unfinished` and others are appended


def shown(value: Any) -> str:
    """A value as it would stand in the file."""
    if value is None or isinstance(value, bool):
        return {None: "unset", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return f"[{', '.join(shown(its) for its in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown(its)}' for key, its in value.items())}}}"
    return str(value)


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Dotted key -> its last part, or all of it where another ends alike."""
    keys = list(keys)
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def run_name(parameters: Mapping[str, Any], seed: int | None, taken: Container[str]) -> str:
    """A readable name for a run's folder, which no other has."""
    short = short_keys(parameters)
    parts = [f"{short[key]}={shown(value)}" for key, value in parameters.items()]
    parts.sort(key=lambda part: not part.startswith("method="))
    if seed is not None:
        parts.append(f"seed={seed}")
    plain = re.sub(r"[^\w.=,+-]+", "_", ",".join(parts)) or "run"
    start = plain.encode()[:_LONGEST].decode(errors="ignore")
    name, number = start, 1
    while name in taken:
        number += 1
        name = f"{start}-{number}"
    return name
