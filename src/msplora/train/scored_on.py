"""What the metric of a run is of: runs scored on other rows or tokens cannot be compared by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .metric_order import PAIRS_IN_ORDER

if TYPE_CHECKING:  # which takes seconds to import
    from .job import Job

_NAMED_AT_MOST = 3


@dataclass(frozen=True)
class ScoredOn:
    """The held-out rows of a run, and how much of them its metric counts."""

    rows: int | None
    checksum: int | None
    """Of what the rows say, before a tokenizer has seen them."""
    tokens: int | None
    """Those that count; None where the metric counts rows."""

    @classmethod
    def of(cls, job: Job) -> ScoredOn | None:
        """What a run is scored on; None where it holds out nothing."""
        if not job.held_out or job.record.held_out is None:
            return None
        rows, checksum = job.record.held_out.rows, job.record.held_out.checksum
        check = job.check.held_out if job.check else None
        if check is None:
            return cls(rows, checksum, None)
        counts_tokens = job.best != PAIRS_IN_ORDER
        return cls(check.kept, checksum, check.trained_tokens if counts_tokens else None)


def difference(several: Sequence[ScoredOn]) -> str | None:
    """How they differ, as in "639 and 2,004 tokens"; None where they do not."""
    for what in ("tokens", "rows"):
        counts = sorted({getattr(its, what) or 0 for its in several})
        if len(counts) > _NAMED_AT_MOST:
            return f"from {counts[0]:,} to {counts[-1]:,} {what}"
        if len(counts) > 1:
            *first, last = (f"{its:,}" for its in counts)
            return f"{', '.join(first)} and {last} {what}"
    return "rows that differ" if len(set(several)) > 1 else None
