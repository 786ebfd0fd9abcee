"""Rows that a run cannot use: an error, or counted and left out, as `data.bad_rows` says."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

from .data_files import DataError
from .settings_data import BadRowsPolicy


class BadRows:
    """What becomes of the rows that are no sample, and which they were.

    A row is one by its place, so that one that stands twice by its source's weight counts once.
    Without a policy a bad row is an error that names no setting, as where every row must count.
    """

    def __init__(self, policy: BadRowsPolicy | None = None) -> None:
        self._policy = policy
        self._reasons: dict[str, str] = {}

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Around what is made of one row alone: an error of it is raised, or it is left out."""
        try:
            yield
        except DataError as error:
            if self._policy is None:
                raise
            if self._policy == "error":
                said = str(error)
                said += "" if said.endswith((".", "?", "!")) else "."  # a template's may have none
                raise DataError(
                    f"{said} To count such rows and leave them out, set data.bad_rows: drop."
                ) from error
            self._reasons.setdefault(place, str(error).removeprefix(place).lstrip(":, "))

    def refuse_if_none_left(self, rows: Sized, what: str) -> None:
        """Raise where rows were left out and none is left."""
        if self._reasons and not rows:
            raise DataError(f"no {what} is left; {self}")

    def __contains__(self, place: str) -> bool:
        return place in self._reasons

    def to_dict(self) -> dict[str, Any]:
        """How many were left out, and the first of them, as data.json has it."""
        first = next(iter(self._reasons.items()), None)
        example = dict(zip(("row", "reason"), first, strict=True)) if first else None
        return {"rows": len(self._reasons), "example": example}

    def notes(self) -> list[str]:
        """One line on what was left out, if anything was."""
        return [f"left out: {self}"] if self._reasons else []

    def __str__(self) -> str:
        place, reason = next(iter(self._reasons.items()), ("", ""))
        return f"{len(self._reasons):,} bad rows (data.bad_rows: drop), as {place}: {reason}"
