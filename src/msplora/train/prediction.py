"""What a saved model says to each row of a file: classes with probabilities, or completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from .data_check import share
from .data_classification import Classes, examples, fit_columns
from .data_files import TABLES, DataError, Row, read_rows, suffix_of
from .data_forms import WITHOUT_PROMPTS
from .data_glue import read_glue_file
from .data_images import labelled_images, read_more_images
from .data_preference import read_prompts
from .data_sft import Sample, read_more_sft
from .data_sources import WHOLE_TEXT
from .generation import continue_prompts, prompt_to_continue
from .held_out_loss import autocast
from .image_classification import Pixels
from .lengths import Limit, row_limit
from .quiet import quiet_libraries
from .saved_run import SavedRun, open_run
from .tokenise_classification import tokenise_examples

Prediction = dict[str, Any]


def predict_file(
    path: Path | str,
    file: Path | str,
    base: str | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 128,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    notify: Callable[[str], None] = lambda _: None,
) -> Iterator[Prediction]:
    """Yield a prediction for each row of `file`, in its order; labels in it are not read.

    Args:
        progress: is told what is done, of how many rows and of how many in all.
        notify: is told in a sentence what the predictions do not show by themselves.
    """
    is_folder = Path(file).is_dir()
    if suffix_of(file) == WHOLE_TEXT and not is_folder:
        raise DataError(
            f"{file} is one text without rows; msplora predict answers the prompts of rows. Give a "
            f"file of them ({', '.join(TABLES)}), or use msplora generate --prompt."
        )
    rows = [] if is_folder else read_rows(file)  # first, so that a bad file costs no loading
    with quiet_libraries():
        run = open_run(path, base)
        if run.settings.task == "image-classification":
            total, found = _classify_images(run, file, batch_size)
        elif is_folder:
            raise DataError(f"{file} is a folder, and {path} was not trained on images.")
        elif run.record.classes:
            rows = read_glue_file(run.settings.data.glue, file)
            total, found = len(rows), _classify(run, rows, batch_size, notify)
        else:
            # All of them first: one that cannot be answered is not to cost the answers before it.
            asked = [prompt_to_continue(run, sample) for sample in _prompts(run, file, rows)]
            answers = continue_prompts(run, asked, max_new_tokens, batch_size, notify)
            total, found = len(asked), ({"completion": answer} for answer in answers)
        for number, its in enumerate(found, 1):
            yield {"row": number, **its}
            progress("predicting", number, total)


def _prompts(run: SavedRun, file: Path | str, rows: list[Row]) -> list[Sample]:
    forms = run.record.forms
    if run.record.form in WITHOUT_PROMPTS:
        raise DataError(
            f"{run.path} was trained on plain text, which has no prompts to answer; use msplora "
            f"generate --prompt."
        )
    if run.settings.task == "dpo":
        return read_prompts(rows, forms, run.settings.data)
    return read_more_sft(str(file), forms, run.settings.data, unanswered=True)[0]


def _classify(
    run: SavedRun, rows: list[Row], batch_size: int, notify: Callable[[str], None]
) -> Iterator[Prediction]:
    classes = run.record.classes
    assert classes
    # Every row gets its line, so none is dropped here.
    limit = row_limit(run.settings, run.base.model)
    limit = Limit(limit.positions, limit.length or limit.positions, "truncate")
    asked = examples(rows, fit_columns(rows, classes), labelled=False)
    data, report = tokenise_examples(asked, run.base.tokenizer, limit, "given")
    if report.truncated:
        notify(
            f"{share(report.truncated, report.rows)} rows have more than {limit.length} tokens, "
            f"and were cut to those."
        )
    batches = (
        run.base.tokenizer.pad(data[start : start + batch_size], return_tensors="pt")
        for start in range(0, len(data), batch_size)
    )
    for its in _logits(run, batches):
        yield _said(its, classes)


def _classify_images(
    run: SavedRun, path: Path | str, batch_size: int
) -> tuple[int, Iterator[Prediction]]:
    """How many images there are, and what is said to each."""
    classes = run.record.classes
    assert classes
    rows = read_more_images(path, classes, labelled=False)
    images = labelled_images(rows, classes, labelled=False)
    batches = DataLoader(Pixels(images, run.base.tokenizer), batch_size)
    return len(images), (
        ({"image": image.source} if isinstance(image.source, str) else {}) | _said(its, classes)
        for image, its in zip(images, _logits(run, batches), strict=True)
    )


def _logits(run: SavedRun, batches: Iterable[Mapping[str, torch.Tensor]]) -> Iterator[torch.Tensor]:
    """The outputs for each row of the batches."""
    device = run.model.device
    for batch in batches:
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.no_grad(), autocast(device.type, run.base.arithmetic):
            logits = run.model(**inputs).logits.float()
        yield from logits


def _said(logits: torch.Tensor, classes: Classes) -> Prediction:
    if classes.regression:
        return {"prediction": logits.squeeze().item()}
    odds = logits.softmax(-1).tolist()
    name = classes.labels[int(logits.argmax().item())]
    return {"prediction": name, "probabilities": dict(zip(classes.labels, odds, strict=True))}
