"""Training and held-out rows of a run, before anything is tokenised."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TypeVar

from .data_files import DataError, Row
from .data_glue import read_glue
from .data_sources import is_whole_text, named_sources, read_source, repeated, source_name
from .settings_data import DataSettings, DataSource

Item = TypeVar("Item")


@dataclass(frozen=True)
class Part:
    """What one source gives to one split."""

    source: DataSource
    rows: list[Row]

    @property
    def name(self) -> str:
        """What the source is called."""
        return source_name(self.source)

    @property
    def whole_text(self) -> bool:
        """Whether its one row is a text that is yet to be cut into chunks."""
        return is_whole_text(self.source)


@dataclass(frozen=True)
class Splits:
    """The parts to train on and those to judge by; `drawn` where both are of the same sources.

    Training rows stand as often as their source's weight says; the copies are the same objects.
    """

    train: list[Part]
    held_out: list[Part]
    drawn: bool


def read_parts(data: DataSettings, seed: int, whole_texts: bool = False) -> Splits:
    """Return what each source gives. Rows are held out before any is repeated.

    `whole_texts` takes .txt files, too.
    """
    if data.glue:
        assert data.path  # checked with the settings
        train, held_out = (
            [
                Part(
                    DataSource(path=f"{data.path}/{split}.tsv"),
                    read_glue(data.glue, data.path, split),
                )
            ]
            for split in ("train", "dev")
        )
    else:
        train = _read(_training_sources(data), whole_texts)
        held_out = _read(_held_out_sources(data), whole_texts)
    drawn = not held_out and data.validation_fraction > 0
    if drawn:
        train, held_out = _hold_out_parts(train, data.validation_fraction, seed)
    train = [replace(part, rows=part.rows[: data.max_rows]) for part in train]
    held_out = [replace(part, rows=part.rows[: data.max_rows]) for part in held_out]
    return Splits(
        [_weighted(part, f"{seed} {place}") for place, part in enumerate(train)], held_out, drawn
    )


def read_splits(data: DataSettings, seed: int) -> tuple[list[Row], list[Row]]:
    """Return (training rows, held-out rows) of tables; the second may be empty."""
    splits = read_parts(data, seed)
    return all_rows(splits.train), all_rows(splits.held_out)


def all_rows(parts: list[Part]) -> list[Row]:
    """The rows of all parts in their order."""
    return [row for part in parts for row in part.rows]


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


def _training_sources(data: DataSettings) -> list[DataSource]:
    if not data.hub:
        return named_sources(data.train, "data.train")
    return [_hub(data, data.train_split)]


def _held_out_sources(data: DataSettings) -> list[DataSource]:
    if data.hub and data.validation_split:
        return [_hub(data, data.validation_split)]
    return named_sources(data.validation, "data.validation")


def _hub(data: DataSettings, split: str) -> DataSource:
    return DataSource(hub=data.hub, config=data.hub_config, revision=data.hub_revision, split=split)


def _read(sources: list[DataSource], whole_texts: bool) -> list[Part]:
    return [Part(source, read_source(source, whole_texts)) for source in sources]


def _hold_out_parts(parts: list[Part], fraction: float, seed: int) -> tuple[list[Part], list[Part]]:
    """Hold out a share of all rows together, and of each whole text its end."""
    places = [
        (place, row) for place, part in enumerate(parts) if not part.whole_text for row in part.rows
    ]
    train_rows, held_rows = hold_out(places, fraction, seed) if places else ([], [])
    of_part: dict[int, tuple[list[Row], list[Row]]] = defaultdict(lambda: ([], []))
    for side, rows in enumerate((train_rows, held_rows)):
        for place, row in rows:
            of_part[place][side].append(row)
    train, held_out = [], []
    for place, part in enumerate(parts):
        if part.whole_text:
            kept, held = _hold_out_end(part.rows[0], fraction)
        else:
            kept, held = of_part[place]
        # A small source may go to one split only.
        train += [replace(part, rows=kept)] * bool(kept)
        held_out += [replace(part, rows=held)] * bool(held)
    return train, held_out


def _hold_out_end(row: Row, fraction: float) -> tuple[list[Row], list[Row]]:
    """The end of a text, not chunks from all over it: neighbours of a held-out one give it away."""
    text = row["text"]
    cut = int(len(text) * (1 - fraction))
    near = max(0, cut - (len(text) - cut) // 2)  # at most half as much again is held out
    # At a line's end or between words, where there is one.
    cut = text.rfind("\n", near, cut) + 1 or text.rfind(" ", near, cut) + 1 or cut
    begin, end = (
        replace(row, values={"text": text[:cut]}),
        replace(row, values={"text": text[cut:]}),
    )
    return [begin], [end] if text[cut:].strip() else []


def _weighted(part: Part, seed: str) -> Part:
    weight = part.source.weight
    if part.whole_text and not weight.is_integer():
        raise DataError(
            f"{part.name}: a whole text is one piece, so its weight is a whole number; found "
            f"{weight:g}."
        )
    rows = repeated(part.rows, weight, seed)
    if not rows:
        raise DataError(
            f"{part.name}: a weight of {weight:g} leaves none of its {len(part.rows)} rows. Raise "
            f"it, or leave the source out."
        )
    return replace(part, rows=rows)
