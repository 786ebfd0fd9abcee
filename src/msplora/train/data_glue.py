"""The six GLUE tasks of the paper, from the files as GLUE distributes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .data_files import DataError, Row, read_rows, read_text, split_tsv


@dataclass(frozen=True)
class GlueTask:
    """Where a task's files keep their columns, and what its labels are."""

    text_columns: tuple[str, ...]
    label_column: str
    # In GLUE's order; empty for regression.
    labels: tuple[str, ...] = ()
    # GLUE's range of scores, for regression.
    label_range: tuple[float, float] | None = None


_ENTAILMENT = ("entailment", "not_entailment")
_YES_NO = ("0", "1")

GLUE = {
    "mrpc": GlueTask(("#1 String", "#2 String"), "Quality", _YES_NO),
    "cola": GlueTask(("sentence",), "label", _YES_NO),
    "rte": GlueTask(("sentence1", "sentence2"), "label", _ENTAILMENT),
    "sst2": GlueTask(("sentence",), "label", _YES_NO),
    "qnli": GlueTask(("question", "sentence"), "label", _ENTAILMENT),
    "stsb": GlueTask(("sentence1", "sentence2"), "score", label_range=(0.0, 5.0)),
}

_COLA_COLUMNS = ("source", "label", "author_mark", "sentence")


def read_glue(task: str, folder: Path | str, split: str) -> list[Row]:
    """Return the rows of `train` or `dev` of a task."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"data.path {folder} is not a folder; give the one that holds {split}.tsv.")
    file = folder / f"{split}.tsv"
    rows = read_glue_file(task, file)
    wanted = (*GLUE[task].text_columns, GLUE[task].label_column)
    missing = [column for column in wanted if column not in rows[0].values]
    if missing:
        raise DataError(
            f"{file} has no column {missing[0]!r}, which GLUE's {task} has; it has "
            f"{', '.join(rows[0].values)}. Is data.path the folder of {task}?"
        )
    return rows


def read_glue_file(task: str | None, file: Path | str) -> list[Row]:
    """Return the rows of one file, which may be of CoLA's form where the task is CoLA.

    CoLA's train.tsv and dev.tsv have no header, but its test.tsv has one.
    """
    file = Path(file)
    if task != "cola" or file.suffix.lower() != ".tsv":
        return read_rows(file)
    _, first = split_tsv(read_text(file))[0]
    return read_rows(file) if "sentence" in first else _cola(file)


def _cola(file: Path) -> list[Row]:
    """CoLA has no header: source, label, the author's own mark, sentence."""
    rows = []
    for number, fields in split_tsv(read_text(file)):
        place = f"{file}, line {number}"
        if len(fields) != len(_COLA_COLUMNS):
            raise DataError(
                f"{place}: {len(fields)} fields; a line of CoLA has {len(_COLA_COLUMNS)} "
                f"({', '.join(_COLA_COLUMNS)}), and the file no header."
            )
        rows.append(Row(place, dict(zip(_COLA_COLUMNS, fields, strict=True))))
    return rows
