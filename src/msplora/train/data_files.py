"""Rows from a local file or the hub. Every row remembers where it stands, for the errors."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msplora.errors import MSPLoraError, nearest, nearest_path

TABLES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
GZIP = ".gz"
"""May follow the suffix of any file of text."""


class DataError(MSPLoraError):
    """Data that cannot be read, or that does not hold what the run needs."""


@dataclass(frozen=True)
class Row:
    """One record and the place it came from, as in `train.tsv, line 7`."""

    place: str
    values: dict[str, Any]

    def __getitem__(self, column: str) -> Any:
        return self.values[column]


def suffix_of(file: Path | str) -> str:
    """The suffix that says how a file is read: `.jsonl`, also of `rows.jsonl.gz`."""
    file = Path(file)
    return Path(file.stem if file.suffix.lower() == GZIP else file.name).suffix.lower()


def read_text(file: Path | str) -> str:
    """Return the text of a file that must exist, be UTF-8 and hold something."""
    file = Path(file)
    _refuse_missing(file)
    opened = gzip.open if file.suffix.lower() == GZIP else open
    try:
        with opened(file, "rb") as stream:
            # The byte-order mark that MRPC's file begins with belongs to no column's name.
            text = io.TextIOWrapper(io.BytesIO(stream.read()), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}). Convert it first."
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{file} is no whole gzip file: {error}. Copy or download it again, or take {GZIP} off "
            f"its name if it is not compressed."
        ) from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from None
    if not text.strip():
        raise DataError(f"{file} is empty.")
    return text


def check_named(data: str) -> None:
    """Refuse a file (or a folder of images) that is not there, before a model is loaded for it.

    Raises:
        DataError: there is neither, and the name is no pattern.
    """
    if not glob.has_magic(data) and not Path(data).expanduser().is_dir():
        _refuse_missing(Path(data).expanduser())


def _refuse_missing(file: Path) -> None:
    if not file.exists():
        hint = nearest_path(file) or " Check the path."
        raise DataError(f"the data file {file} does not exist.{hint}")
    if file.is_dir():
        raise DataError(
            f"{file} is a folder; give the path of a file ({', '.join(TABLES)}), or a pattern such "
            f"as {file}/*.jsonl for several."
        )


def read_rows(file: Path | str) -> list[Row]:
    """Return the rows of a .tsv (no quoting), .csv (quoted), .jsonl, .json or .parquet file."""
    file = Path(file)
    suffix = suffix_of(file)
    if file.exists() and not file.is_dir() and suffix not in TABLES:
        raise DataError(
            f"{file}: cannot read {suffix or 'a file without suffix'}; "
            f"use one of {', '.join(TABLES)} (or for sft .txt)."
        )
    if suffix == ".parquet":
        rows = _parquet(file)
    elif suffix == ".tsv":
        rows = _table(file, split_tsv(read_text(file)))
    elif suffix == ".csv":
        rows = _table(file, _csv_records(file, read_text(file)))
    elif suffix == ".jsonl":
        rows = _jsonl(file, read_text(file))
    else:
        rows = _json(file, read_text(file))
    if not rows:
        raise DataError(
            f"{file} holds no rows, only a header."
            if suffix in (".tsv", ".csv")
            else f"{file} holds no rows."
        )
    return rows


def split_tsv(text: str) -> list[tuple[int, list[str]]]:
    """Return (line number, fields): tabs separate and nothing quotes, as in GLUE's files.

    A blank line is a row where it has as many fields as the first one, all of them empty; that a
    file of one column ends with blank lines does not count.
    """
    # Not str.splitlines: sentences may hold characters that it takes for line ends.
    lines = [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")]
    tabs = next((line.count("\t") for line in lines if line.strip()), 0)
    begun, records = False, []
    for number, line in enumerate(lines, 1):
        begun = begun or bool(line.strip())
        if line.strip() or (begun and line.count("\t") == tabs):
            records.append((number, line.split("\t")))
    return records


def _csv_records(file: Path, text: str) -> list[tuple[int, list[str]]]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records = []
    first_line = 1
    try:
        for fields in reader:
            if fields:
                records.append((first_line, fields))
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}, line {first_line}: not valid CSV: {error}.") from None
    return records


def _table(file: Path, records: list[tuple[int, list[str]]]) -> list[Row]:
    (_, header), *body = records
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{file}: the header names {', '.join(repeated)} more than once.")
    rows = []
    for number, fields in body:
        if len(fields) != len(header):
            raise DataError(
                f"{file}, line {number}: {len(fields)} fields, but the header has {len(header)} "
                f"({', '.join(header)})."
            )
        rows.append(Row(f"{file}, line {number}", dict(zip(header, fields, strict=True))))
    return rows


def _jsonl(file: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{place}: not valid JSON: {error.msg} at column {error.colno}."
            ) from None
        rows.append(Row(place, _record(place, value)))
    return rows


def _json(file: Path, text: str) -> list[Row]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = (
            " One object per line is JSONL: name the file .jsonl." if "Extra" in error.msg else ""
        )
        raise DataError(
            f"{file}, line {error.lineno}: not valid JSON: {error.msg} at column "
            f"{error.colno}.{hint}"
        ) from None
    if isinstance(value, dict):
        lists = [key for key, its in value.items() if isinstance(its, list)]
        if len(lists) != 1:
            raise DataError(
                f"{file} holds one object with {len(lists)} lists; a data file is a list of "
                f"objects, or an object with one such list."
            )
        value = value[lists[0]]
    if not isinstance(value, list):
        raise DataError(f"{file} holds a {type(value).__name__}; a data file is a list of objects.")
    return [
        Row(place, _record(place, its))
        for place, its in ((f"{file}, row {number}", its) for number, its in enumerate(value, 1))
    ]


def _record(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: found a {type(value).__name__}, expected an object.")
    return value


def _parquet(file: Path) -> list[Row]:
    """Nested columns, such as a list of turns, become lists and dictionaries."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    _refuse_missing(file)
    if file.suffix.lower() == GZIP:
        raise DataError(f"{file}: parquet compresses by itself; unpack it and name it .parquet.")
    try:
        with parquet.ParquetFile(file) as opened:
            table = opened.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file} is no whole parquet file: {error}. Copy or download it again."
        ) from None
    # The features that the datasets library leaves in a file know what its numbers of classes mean.
    known = b"huggingface" in (table.schema.metadata or {})
    features = datasets.Features.from_arrow_schema(table.schema) if known else {}
    return _records(table.to_pylist(), features, str(file))


def _records(
    records: Iterable[dict[str, Any]], features: Mapping[str, Any], place: str
) -> list[Row]:
    """Rows numbered from one, the numbers of known classes turned into their names."""
    import datasets

    classes = {
        column: feature
        for column, feature in features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    rows = []
    for number, record in enumerate(records, 1):
        values = dict(record)
        for column, feature in classes.items():
            # -1 marks hidden labels of test splits; it stays and is refused as a label later.
            if values[column] is not None and values[column] >= 0:
                values[column] = feature.int2str(values[column])
        rows.append(Row(f"{place}, row {number}", values))
    return rows


def read_hub(
    name: str, split: str, config: str | None = None, revision: str | None = None
) -> list[Row]:
    """Return the rows of one split of a hub dataset, class numbers turned into class names."""
    import datasets

    try:
        data = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # datasets raises a dozen kinds; each means "not to be had"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot load the split {split!r} of the hub dataset {name!r}: {reason} A local file "
            f"goes under data.train."
        ) from error
    assert isinstance(data, datasets.Dataset)
    for column, feature in data.features.items():
        if isinstance(feature, datasets.Image):  # all of them decoded would fill the memory
            data = data.cast_column(column, datasets.Image(decode=False))
    place = hub_name(name, split, config)
    rows = _records(data, data.features, place)  # pyright: ignore[reportArgumentType]
    if not rows:
        raise DataError(f"the split {split!r} of {name!r} is empty.")
    return rows


def refuse_half_characters(text: str, place: str) -> None:
    """Raise where a text holds half of a character, as JSON may and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: half a character, {text[error.start]!r}, is no text (a surrogate without "
            f"its other half, as of an emoji that was cut in two)."
        ) from None


def hub_name(name: str, split: str, config: str | None) -> str:
    """What a split of a hub dataset is called in notes and errors."""
    return ", ".join(filter(None, (name, config, split)))


def require_columns(rows: list[Row], wanted: Iterable[str], key: str) -> None:
    """Refuse rows that lack a column; `key` is the setting that named it."""
    found = list(rows[0].values)
    for column in wanted:
        for row in rows:
            if column not in row.values:
                raise DataError(
                    f"{row.place}: no column {column!r} ({key}). It has: "
                    f"{', '.join(map(str, row.values)) or 'none'}."
                    + nearest(column, map(str, found), count=1)
                )
