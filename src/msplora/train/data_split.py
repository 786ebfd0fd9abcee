"""Training and held-out rows of a run, before anything is tokenised."""

from __future__ import annotations

import random
from typing import TypeVar

from .data_files import DataError, Row, read_hub, read_rows
from .data_glue import read_glue
from .settings import DataSettings

Item = TypeVar("Item")


def read_splits(data: DataSettings, seed: int) -> tuple[list[Row], list[Row]]:
    """Return (training rows, held-out rows) of a table; the second may be empty."""
    if data.glue:
        assert data.path  # checked with the settings
        train = read_glue(data.glue, data.path, "train")
        held_out = read_glue(data.glue, data.path, "dev")
    elif data.hub:
        train = read_hub(data.hub, data.train_split, data.hub_config, data.hub_revision)
        held_out = (
            read_hub(data.hub, data.validation_split, data.hub_config, data.hub_revision)
            if data.validation_split
            else read_rows(data.validation)
            if data.validation
            else []
        )
    else:
        assert data.train  # checked with the settings
        train = read_rows(data.train)
        held_out = read_rows(data.validation) if data.validation else []
    if not held_out and data.validation_fraction:
        train, held_out = hold_out(train, data.validation_fraction, seed)
    return train[: data.max_rows], held_out[: data.max_rows]


def hold_out(items: list[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Split at random, the same way for the same seed; the order within each part is kept."""
    if len(items) < 2:
        raise DataError(
            f"{len(items)} row(s) are too few to hold out a fraction of {fraction}. Add rows, or "
            f"name a held-out file in data.validation."
        )
    count = min(max(1, round(len(items) * fraction)), len(items) - 1)
    chosen = set(random.Random(seed).sample(range(len(items)), count))
    return (
        [item for place, item in enumerate(items) if place not in chosen],
        [item for place, item in enumerate(items) if place in chosen],
    )
