"""Which way a metric is better."""

from __future__ import annotations

LOW_IS_BEST = ("loss", "perplexity")
PAIRS_IN_ORDER = "rewards/accuracies"
"""Of preferences: the share of pairs in the right order, whatever the loss and its beta."""


def sign_of(metric: str | None) -> int:
    """What a value is multiplied by so that more is better: 1, or -1 of losses."""
    return -1 if metric in LOW_IS_BEST else 1
