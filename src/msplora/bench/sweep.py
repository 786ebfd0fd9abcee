"""Measure point after point; what is done is in the file before the next one starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msplora.errors import MSPLoraError

from .results import ResultFile, Row

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


def missing(
    points: Sequence[Any], methods: Sequence[str], file: ResultFile, same: Mapping[str, Any]
) -> list[Any]:
    """The points that a continued file has not yet.

    Raises:
        MSPLoraError: it has one of them, measured otherwise.
    """
    return [point for point in points if not file.holds(point.keys(), methods, **same)]


def run_sweep(
    points: Sequence[Any],
    measure: Callable[[Any], list[Row]],
    file: ResultFile,
    on_point: Callable[[Any], object] = lambda point: None,
) -> None:
    """Measure the points in turn and add their rows to the file.

    Raises:
        MSPLoraError: the device's memory did not suffice after all; earlier points are kept.
    """
    for point in points:
        on_point(point)
        try:
            rows = measure(point)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            kept = f" The points before it are in {file.path}." if file.path and file.rows else ""
            said = next(iter(str(error).strip().splitlines()), "")
            raise MSPLoraError(
                f"{point} ran out of memory{f': {said}' if said else '.'} {point.smaller}.{kept}"
            ) from error
        file.add(rows)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was what there was too little of: torch has no class for it on a CPU, and
    what a GPU's libraries want for themselves fails in their own words."""
    import torch

    from .gpu_figures import TooFullError

    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError, TooFullError)):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)
