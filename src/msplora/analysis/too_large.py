"""Adapters whose numbers are finite, and whose updates are not: refused with the weight's name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from msplora.errors import AdapterFileError

from .results import Measures


@contextmanager
def products_that_are_numbers(adapter: Path, kind: str) -> Iterator[None]:
    """Turn the error of a decomposition that met an infinity into one that names the weights.

    Raises:
        AdapterFileError: an update of the kind has numbers that are too large.
    """
    try:
        yield
    except (torch.linalg.LinAlgError, OverflowError) as error:
        raise _refusal(adapter, kind) from error


def check_norms(adapter: Path, weight: str, measured: Iterable[Measures]) -> None:
    """Refuse norms that are infinite, which JSON cannot hold.

    Raises:
        AdapterFileError: the square of one of a weight's updates has no number in float64.
    """
    if not all(math.isfinite(its.norm) for its in measured):
        raise _refusal(adapter, weight)


def _refusal(adapter: Path, weight: str) -> AdapterFileError:
    return AdapterFileError(
        f"{str(adapter)!r}: the update s·BA of {weight!r} is too large for floating-point numbers. "
        f"The training diverged, or the file is damaged; look at its norms with msplora inspect."
    )
