"""One level over all the weights that it adapts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .results import LevelSummary, Measures, mean
from .stored import StoredAdapter


def summarise(
    adapter: StoredAdapter, measures: Sequence[Sequence[Measures]]
) -> tuple[LevelSummary, ...]:
    """Per level; `measures` has one entry per weight, with one entry per level."""
    squares = [sum(of[place].norm ** 2 for of in measures) for place in range(len(adapter.levels))]
    ranks, found = adapter.ranks, []
    for place, level in enumerate(adapter.levels):
        of_level = [of[place] for of in measures]
        acting = [its for its in of_level if its.norm > 0]
        found.append(
            LevelSummary(
                level,
                math.sqrt(squares[place] / len(measures)),
                squares[place] / sum(squares) if sum(squares) else None,
                mean(its.effective_rank for its in acting),
                mean(its.stable_rank for its in acting),
                ranks[level],
            )
        )
    return tuple(found)
