"""The rows that a run held out, known again: what is judged later has to be the same rows."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from .data_files import DataError
from .data_sources import named_sources, source_name
from .settings_data import DataSettings


@dataclass(frozen=True)
class HeldOutRows:
    """How many rows were held out, and the checksum of what they say, as task.json keeps them."""

    rows: int
    checksum: int

    @classmethod
    def of(cls, rows: Sequence[Any]) -> HeldOutRows:
        """Of samples, pairs, examples or images, before a tokenizer has seen them."""
        found = 0
        for row in rows:
            found = zlib.crc32(json.dumps(_content(row), sort_keys=True).encode(), found)
        return cls(len(rows), found)

    def check(self, rows: Sequence[Any], run: Path, data: DataSettings) -> None:
        """Refuse rows that are others: the run may have been trained on some of them.

        Raises:
            DataError: the data changed since the run, or are read in another way.
        """
        now = HeldOutRows.of(rows)
        if now == self:
            return
        what = (
            f"gives {now.rows} rows now"
            if now.rows != self.rows
            else "gives as many rows now, but others"
        )
        raise DataError(
            f"{run} held out {self.rows} rows, and {_names(data)} {what}: it changed since, so "
            f"there may be rows among them that the run was trained on. Put the old content back, "
            f"or give a file with --data."
        )


def _names(data: DataSettings) -> str:
    """Where the held-out rows are from."""
    if data.glue:
        return f"{data.path}/dev.tsv"
    if data.hub:
        return f"{data.hub}, {data.validation_split or data.train_split}"
    key = "validation" if data.validation else "train"
    return ", ".join(
        source_name(source) for source in named_sources(getattr(data, key), f"data.{key}")
    )


def _content(value: Any) -> Any:
    """What a row says, as JSON. Where it stands is left out, and what is as it is by default: a
    later version with further fields finds the same.
    """
    if is_dataclass(value):
        file = getattr(value, "source", None)
        if isinstance(file, (str, Path)):  # of an image
            return ["/".join(Path(file).parts[-2:]), Path(file).stat().st_size, value.label]  # pyright: ignore
        return {
            field.name: _content(getattr(value, field.name))
            for field in fields(value)
            if field.name != "place" and getattr(value, field.name) != field.default
        }
    if isinstance(value, Mapping):
        return {str(key): _content(its) for key, its in value.items()}
    if isinstance(value, (list, tuple)):
        return [_content(its) for its in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    if hasattr(value, "tobytes"):  # an image in memory
        value = value.tobytes()
    return zlib.crc32(value) if isinstance(value, bytes) else str(value)
