"""Measure a saved model on held-out rows: its run's own, or a file's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from msplora.loading import BaseOptions

from .base_model import load_base
from .classification import classification_trainer
from .data_classification import Example, examples, fit_columns, read_classification
from .data_files import DataError, check_named
from .data_glue import read_glue_file
from .data_images import labelled_images, read_images, read_more_images
from .data_preference import Pair, read_more_preferences, read_preferences
from .data_sft import Sample, read_more_sft, read_sft
from .dpo import HeldOutDPOTrainer, preference_trainer
from .held_out_loss import held_out_loss
from .image_classification import Pixels
from .init_from import check_start
from .lengths import LengthReport, row_limit
from .progress import plain_metrics
from .quiet import quiet_libraries
from .saved_run import SavedRun, open_run
from .settings import Task
from .settings_data import DataSettings
from .sft import padding_id
from .tokenise_classification import tokenise_examples
from .tokenise_preference import PairTokens, tokenise_pairs
from .tokenise_sft import Tokens, tokenise_samples
from .trainer_arguments import trainer_arguments

Row = TypeVar("Row")


def evaluate_run(
    path: Path | str,
    data: str | None = None,
    base: str | BaseOptions | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Return the metrics of a run or adapter; without `data`, on the rows its run held out.

    `base` is its base where that has moved, or how to load it, but for the dtype, which is the
    run's.
    """
    if data:
        check_named(data)
    with quiet_libraries():
        run = open_run(path, base)
        batch_size = batch_size or run.settings.training.eval_batch_size
        found = _BY_TASK[run.settings.task](run, data, batch_size)
        return {"run": str(path), "data": data or _held_out_in_words(run)} | found


def _held_out_in_words(run: SavedRun) -> str:
    if run.record.held_out:
        return "held out by the run"
    return "held out by the run, if its data are unchanged: an older msplora kept no checksum"


def _held_out(run: SavedRun, rows: list[Row]) -> list[Row]:
    """The rows, refused where there are none, or where they are not those the run held out."""
    if not rows:
        raise DataError(f"the run {run.path} held out no rows; give a file with --data.")
    if run.record.held_out:
        run.record.held_out.check(rows, run.path, run.settings.data)
    return rows


def _classification(run: SavedRun, data: str | None, batch_size: int) -> dict[str, Any]:
    inputs, report = text_rows(run, data)
    return {"rows": len(inputs), **report.left_out(), **_judge(run, inputs, batch_size)}


def text_rows(run: SavedRun, data: str | None) -> tuple[Any, LengthReport]:
    """Rows of texts as a classifier takes them; without `data`, those the run held out."""
    classes, settings = run.record.classes, run.settings
    assert classes
    held_out: list[Example]
    bad = None  # of a file that is given, every row counts
    if data:
        rows = read_glue_file(settings.data.glue, data)
        held_out = examples(rows, fit_columns(rows, classes))
    else:
        found = read_classification(_with_classes(run), settings.seed)
        held_out, bad = _held_out(run, found.held_out), found.bad
    limit = row_limit(settings, run.base.model)
    return tokenise_examples(held_out, run.base.tokenizer, limit, "held-out", bad)


def _images(run: SavedRun, data: str | None, batch_size: int) -> dict[str, Any]:
    inputs = image_rows(run, data)
    return {"rows": len(inputs), **_judge(run, inputs, batch_size)}


def image_rows(run: SavedRun, data: str | None) -> Pixels:
    """Images as a classifier takes them; without `data`, those the run held out."""
    classes, settings = run.record.classes, run.settings
    assert classes
    if data:
        held_out = labelled_images(read_more_images(data, classes), classes)
    else:
        held_out = _held_out(run, read_images(_with_classes(run), settings.seed)[1])
    return Pixels(held_out, run.base.tokenizer)


def _with_classes(run: SavedRun) -> DataSettings:
    """The run's data, with the classes in the order that its head has."""
    data, classes = run.settings.data, run.record.classes
    assert classes
    if data.glue or not classes.labels:
        return data
    return data.model_copy(update={"labels": list(classes.labels)})


def _judge(run: SavedRun, inputs: Any, batch_size: int) -> dict[str, float]:
    """The metrics of a classifier."""
    classes, settings = run.record.classes, run.settings
    assert classes
    with _judging(run, len(inputs), batch_size) as arguments:
        trainer = classification_trainer(
            settings, run.base, classes, run.model, arguments, held_rows=inputs
        )
        return plain_metrics(trainer.evaluate())


def _language_model(run: SavedRun, data: str | None, batch_size: int) -> dict[str, Any]:
    rows, report = token_rows(run, data)
    found = held_out_loss(
        run.model, rows, padding_id(run.base.tokenizer), batch_size, run.base.arithmetic
    )
    return {"rows": len(rows), **report.left_out(), **found}


def token_rows(run: SavedRun, data: str | None) -> tuple[list[Tokens], LengthReport]:
    """Rows of a language model; without `data`, those the run held out."""
    settings, forms = run.settings, run.record.forms
    held_out: list[Sample]
    bad, empty = None, 0  # of a file that is given, every row counts
    if data:
        held_out, empty = read_more_sft(data, forms, settings.data)
    elif not forms:
        raise DataError(f"{run.path} does not say what it was trained on; give a file with --data.")
    else:
        found = read_sft(settings.data, settings.seed)
        held_out, bad = _held_out(run, found.held_out), found.bad
    rows, report = tokenise_samples(
        held_out,
        run.base.tokenizer,
        row_limit(settings, run.base.model),
        "held-out",
        settings.training.completion_only_loss,
        None if data else settings.data.max_rows,
        bad,
    )
    return rows, replace(report, empty=empty)


def _preferences(run: SavedRun, data: str | None, batch_size: int) -> dict[str, Any]:
    rows, report = pair_rows(run, data)
    trainer = pair_judge(run, rows, batch_size)
    found = {"rows": len(rows), **report.left_out(), **plain_metrics(trainer.evaluate())}
    if run.settings.init_from and run.record.start is None:
        found["reference"] = (
            f"{run.settings.init_from}, if it is unchanged: an older msplora kept no checksum"
        )
    return found


def pair_rows(run: SavedRun, data: str | None) -> tuple[list[PairTokens], LengthReport]:
    """Pairs as token ids; without `data`, those the run held out."""
    settings, forms = run.settings, run.record.forms
    held_out: list[Pair]
    bad, empty = None, 0
    if data:
        held_out, empty = read_more_preferences(data, forms, settings.data)
    else:
        found = read_preferences(settings.data, settings.seed)
        held_out, bad = _held_out(run, found.held_out), found.bad
    limit = row_limit(settings, run.base.model)
    rows, report = tokenise_pairs(held_out, run.base.tokenizer, limit, "held-out", bad)
    return rows, replace(report, empty=empty)


def pair_judge(run: SavedRun, rows: list[PairTokens], batch_size: int) -> HeldOutDPOTrainer:
    """What compares the model's answers to pairs with those of the model it started from."""
    settings = run.settings
    check_start(settings, run.record.start or {})
    reference = load_base(settings, None).model if settings.method == "full" else None
    with _judging(run, len(rows), batch_size) as arguments:
        return preference_trainer(
            settings, run.base, run.model, arguments, rows, rows, reference=reference
        )


@contextmanager
def _judging(run: SavedRun, rows: int, batch_size: int) -> Iterator[dict[str, Any]]:
    """The arguments of a trainer that only measures, and tells no tracker of it."""
    with tempfile.TemporaryDirectory() as nowhere:  # the trainer insists on a folder
        arguments = trainer_arguments(run.settings, run.base, Path(nowhere), rows, False, "loss")
        yield arguments | {"per_device_eval_batch_size": batch_size, "report_to": "none"}


_BY_TASK: dict[Task, Callable[[SavedRun, str | None, int], dict[str, Any]]] = {
    "classification": _classification,
    "image-classification": _images,
    "sft": _language_model,
    "dpo": _preferences,
}
