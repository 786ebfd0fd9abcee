"""Measure a saved model on held-out rows: its run's own, or a file's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from .classification import classification_trainer
from .data_classification import Example, examples, fit_columns, read_classification
from .data_files import DataError
from .data_glue import read_glue_file
from .data_sft import Sample, read_more_sft, read_sft
from .held_out_loss import held_out_loss
from .lengths import row_limit
from .progress import plain_metrics
from .quiet import quiet_libraries
from .saved_run import SavedRun, open_run
from .sft import padding_id
from .tokenise_classification import tokenise_examples
from .tokenise_sft import tokenise_samples
from .trainer_arguments import trainer_arguments


def evaluate_run(
    path: Path | str,
    data: str | None = None,
    base: str | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Return the metrics of a run or adapter; without `data`, on the rows its run held out."""
    with quiet_libraries():
        run = open_run(path, base)
        batch_size = batch_size or run.settings.training.eval_batch_size
        found = _classification if run.record.classes else _language_model
        return {"run": str(path), "data": data or "held out by the run"} | found(
            run, data, batch_size
        )


def _classification(run: SavedRun, data: str | None, batch_size: int) -> dict[str, Any]:
    classes, settings = run.record.classes, run.settings
    assert classes
    held_out: list[Example]
    if data:
        rows = read_glue_file(settings.data.glue, data)
        held_out = examples(rows, fit_columns(rows, classes))
    else:
        held_out = read_classification(settings.data, settings.seed).held_out
    limit = row_limit(settings, run.base.model)
    inputs, report = tokenise_examples(held_out, run.base.tokenizer, limit, "held-out")
    with tempfile.TemporaryDirectory() as nowhere:  # the trainer insists on a folder
        arguments = trainer_arguments(settings, run.base, Path(nowhere), len(inputs), False, "loss")
        arguments["per_device_eval_batch_size"] = batch_size
        trainer = classification_trainer(
            settings, run.base, classes, run.model, arguments, held_rows=inputs
        )
        return {"rows": len(inputs), **report.left_out(), **plain_metrics(trainer.evaluate())}


def _language_model(run: SavedRun, data: str | None, batch_size: int) -> dict[str, Any]:
    settings, forms = run.settings, run.record.forms
    held_out: list[Sample]
    if data:
        held_out = read_more_sft(data, forms, settings.data)
    elif not forms:
        raise DataError(f"{run.path} does not say what it was trained on; give a file with --data.")
    else:
        held_out = read_sft(settings.data, settings.seed).held_out
        if not held_out:
            raise DataError(f"the run {run.path} held out no rows; give a file with --data.")
    rows, report = tokenise_samples(
        held_out,
        run.base.tokenizer,
        row_limit(settings, run.base.model),
        "held-out",
        settings.training.completion_only_loss,
        None if data else settings.data.max_rows,
    )
    found = held_out_loss(
        run.model, rows, padding_id(run.base.tokenizer), batch_size, run.base.arithmetic
    )
    return {"rows": len(rows), **report.left_out(), **found}
