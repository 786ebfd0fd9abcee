"""Texts and labels of a classification or regression task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from msplora.errors import nearest

from .bad_rows import BadRows
from .data_files import DataError, Row, refuse_half_characters, require_columns
from .data_glue import GLUE
from .data_split import all_rows, read_parts
from .settings_data import DataSettings

# Columns that hold the text where none is named, tried in order.
_USUAL_TEXT = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)


@dataclass(frozen=True)
class Example:
    """One or two texts and their label: a class's index, or a number to predict."""

    place: str
    texts: tuple[str, ...]
    label: int | float | None


@dataclass(frozen=True)
class Classes:
    """How labels read: their columns, and the classes in order (none for regression)."""

    text_columns: tuple[str, ...]
    """Of the texts; of an image, its one column."""
    label_column: str
    labels: tuple[str, ...]
    label_range: tuple[float, float] | None = None

    @property
    def regression(self) -> bool:
        """Whether labels are numbers to predict."""
        return not self.labels

    @property
    def outputs(self) -> int:
        """Numbers the head gives."""
        return len(self.labels) or 1


@dataclass(frozen=True)
class SourceOfExamples:
    """What the notes say of one source: how many rows it gave."""

    name: str
    weight: float
    train: int
    held_out: int


@dataclass(frozen=True)
class LabelledData:
    """Examples to train on and to hold out, and how their labels read."""

    train: list[Example]
    held_out: list[Example]
    classes: Classes
    sources: list[SourceOfExamples]
    bad: BadRows = field(default_factory=BadRows)
    """The rows that are no example."""


def read_classification(data: DataSettings, seed: int) -> LabelledData:
    """Return the examples of a run's data."""
    splits = read_parts(data, seed)
    train, held_out = all_rows(splits.train), all_rows(splits.held_out)
    bad = BadRows(data.bad_rows)
    # A class whose only rows were drawn to be held out is a class of the data all the same.
    classes = _classes(data, [*train, *held_out] if splits.drawn else train, bad)
    found = {
        what: examples(rows, classes, bad=bad)
        for what, rows in (("training", train), ("held-out", held_out))
        if rows
    }
    for what, its in found.items():
        bad.refuse_if_none_left(its, f"{what} row")
    sources: dict[str, SourceOfExamples] = {}
    for key, parts in (("train", splits.train), ("held_out", splits.held_out)):
        for part in parts:
            its = sources.get(part.name) or SourceOfExamples(part.name, part.source.weight, 0, 0)
            used = sum(row.place not in bad for row in part.rows)
            sources[part.name] = replace(its, **{key: used})
    return LabelledData(
        found["training"], found.get("held-out", []), classes, list(sources.values()), bad
    )


def fit_columns(rows: list[Row], classes: Classes) -> Classes:
    """The classes with the columns that other rows have for what the run's are called.

    Where the run's columns of text are missing, the usual names stand for them, and columns that
    are just as many; for the column of labels, one called `label`.
    """
    found = list(rows[0].values)
    label = classes.label_column
    if label not in found and "label" in found:
        label = "label"
    texts = classes.text_columns
    others = tuple(name for name in found if name != label)
    if not set(texts) <= set(found):
        usual = [its for its in _USUAL_TEXT if len(its) == len(texts) and set(its) <= set(found)]
        texts = (*usual, others)[0]
        texts = texts if len(texts) == len(classes.text_columns) else classes.text_columns
    return replace(classes, text_columns=texts, label_column=label)


def examples(
    rows: list[Row], classes: Classes, labelled: bool = True, bad: BadRows | None = None
) -> list[Example]:
    """Return the examples in `rows`; unlabelled ones carry no label even where one stands."""
    columns = (*classes.text_columns, classes.label_column) if labelled else classes.text_columns
    bad, found = bad or BadRows(), []
    for row in rows:
        with bad.at(row.place):
            require_columns([row], columns, "data.text_columns and data.label_column")
            texts = tuple(_text(row, column) for column in classes.text_columns)
            label = label_of(row, classes) if labelled else None
            found.append(Example(row.place, texts, label))
    return found


def _having(rows: list[Row], columns: Sequence[str], key: str, bad: BadRows) -> list[Row]:
    """The rows that have the columns; what no row has is not a matter of single rows."""
    if not any(set(columns) <= row.values.keys() for row in rows):
        require_columns(rows, columns, key)
    found = []
    for row in rows:
        with bad.at(row.place):
            require_columns([row], columns, key)
            found.append(row)
    return found


def _classes(data: DataSettings, train: list[Row], bad: BadRows) -> Classes:
    if data.glue:
        task = GLUE[data.glue]
        return Classes(task.text_columns, task.label_column, task.labels, task.label_range)
    text_columns = tuple(data.text_columns or _usual_text_columns(train))
    train = _having(train, text_columns, "data.text_columns", bad)
    train = _having(train, [data.label_column], "data.label_column", bad)
    if data.regression:
        return Classes(text_columns, data.label_column, ())
    return with_classes(data, train, text_columns, ", or set data.regression for numbers")


def with_classes(
    data: DataSettings, train: list[Row], columns: tuple[str, ...], otherwise: str = ""
) -> Classes:
    """The classes that are listed, or else those of the training rows, of what is in `columns`.

    `otherwise` ends the advice where the labels are no classes.
    """
    if data.labels:
        return Classes(columns, data.label_column, tuple(data.labels))
    for row in train:
        if isinstance(row[data.label_column], (list, dict)):
            raise DataError(
                f"{row.place}: the column {data.label_column!r} holds a "
                f"{type(row[data.label_column]).__name__}; a row has one class, or one number with "
                f"data.regression."
            )
    found = {_class_name(row[data.label_column]) for row in train}
    found.discard("")  # reported with its place, where labels are read
    if len(found) < 2:
        place = train[0].place
        raise DataError(
            f"{place.rpartition(',')[0] or place}: the column {data.label_column!r} holds "
            f"{len(found)} class(es) ({', '.join(sorted(found))}); a classifier needs two or more. "
            f"Name them in data.labels{otherwise}."
        )
    if len(found) > max(20, len(train) // 2):
        raise DataError(
            f"the column {data.label_column!r} holds {len(found)} different labels in "
            f"{len(train)} rows; these are hardly classes. Name another data.label_column, list "
            f"the classes in data.labels{otherwise}."
        )
    return Classes(columns, data.label_column, tuple(sorted(found, key=_class_order)))


def _usual_text_columns(rows: list[Row]) -> tuple[str, ...]:
    """The first of the usual columns that the first row with any has."""
    for row in rows:
        for columns in _USUAL_TEXT:
            if all(column in row.values for column in columns):
                return columns
    raise DataError(
        f"{rows[0].place}: none of the usual columns of text is there. Name one or two of "
        f"{', '.join(map(str, rows[0].values))} in data.text_columns."
    )


def _class_name(value: Any) -> str:
    """The name of a label; of a number, the same however it is written."""
    if isinstance(value, float):
        if math.isnan(value):  # how tables write that nothing is there
            return ""
        value = int(value) if value.is_integer() else value
    return "" if value is None else str(value).strip()


def _class_order(name: str) -> tuple[int, float, str]:
    """Numbers by value before words by alphabet, so that class 10 comes after class 9."""
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    # The word nan would stand anywhere among numbers.
    return (0, number, name) if math.isfinite(number) else (1, 0.0, name)


def _text(row: Row, column: str) -> str:
    value = row[column]
    if value is None:
        raise DataError(f"{row.place}: the text in the column {column!r} is null.")
    if not isinstance(value, str):
        raise DataError(
            f"{row.place}: the column {column!r} holds a {type(value).__name__}, not text."
        )
    refuse_half_characters(value, row.place)
    return value


def label_of(row: Row, classes: Classes) -> int | float:
    """The index of the row's class, or the number to predict."""
    name = _class_name(row[classes.label_column])
    if not name:
        raise DataError(f"{row.place}: no label in the column {classes.label_column!r}.")
    if not classes.regression:
        name = _as_listed(row[classes.label_column], classes.labels) or name
        if name not in classes.labels:
            raise DataError(
                f"{row.place}: label {name!r} is none of the classes: "
                f"{', '.join(classes.labels)}.{nearest(name, classes.labels, count=1)}"
            )
        return classes.labels.index(name)
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{row.place}: label {name!r} is not a number, and the task is regression.")
    if classes.label_range and not classes.label_range[0] <= number <= classes.label_range[1]:
        low, high = classes.label_range
        raise DataError(f"{row.place}: label {number:g} is outside the range {low:g} to {high:g}.")
    return number


def _as_listed(value: Any, labels: tuple[str, ...]) -> str | None:
    """The listed class that is the same number as a label, such as 1.0 for 1."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return next((name for name in labels if _class_order(name)[:2] == (0, value)), None)
    return None
