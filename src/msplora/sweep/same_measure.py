"""The keys that change what runs are compared by: their loss, or the rows and tokens it counts."""

from __future__ import annotations

from msplora.train.metric_order import PAIRS_IN_ORDER
from msplora.train.settings import Settings

OF_THE_LOSS = ("training.dpo_beta", "training.dpo_loss")
_OF_TOKENS = ("model", "tokenizer", "data.chat_template", "training.completion_only_loss")
_OF_TRAINING_ROWS = ("seed", "data.train", "data.train_split")


def changes_the_loss(key: str, settings: Settings) -> bool:
    """Whether runs that differ in a key are compared by losses of different formulas."""
    return (
        key in OF_THE_LOSS
        and settings.task == "dpo"
        and settings.training.metric_for_best != PAIRS_IN_ORDER
    )


def changes_what_is_scored(key: str, settings: Settings) -> bool:
    """Whether runs that differ in a key may be scored on other rows or tokens."""
    data, metric = settings.data, settings.training.metric_for_best
    counts_tokens = not settings.classifies and metric != PAIRS_IN_ORDER
    if key in _OF_TOKENS:
        return counts_tokens
    if key in _OF_TRAINING_ROWS:  # of which some are held out where no others are named
        return not (data.glue or data.validation or data.validation_split)
    if key == "data.max_length":
        return counts_tokens or data.too_long == "drop"
    return key.startswith("data.")
