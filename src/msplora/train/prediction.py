"""What a saved model says to each row of a file: classes with probabilities, or completions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from msplora.errors import ConfigError

from .data_classification import Classes, examples, fit_columns
from .data_files import TABLES, DataError, read_rows, suffix_of
from .data_forms import WITHOUT_PROMPTS
from .data_glue import read_glue_file
from .data_images import labelled_images, read_more_images
from .data_preference import read_prompts
from .data_sft import read_more_sft
from .data_sources import WHOLE_TEXT
from .generation import continue_prompt, prompt_to_continue
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
) -> list[Prediction]:
    """Return one prediction for each row of `file`, in its order; labels in it are not read."""
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
            return list(_classify_images(run, file, batch_size))
        if is_folder:
            raise DataError(f"{file} is a folder, and {path} was not trained on images.")
        if run.record.classes:
            rows = read_glue_file(run.settings.data.glue, file)
            return list(_classify(run, rows, batch_size))
        forms = run.record.forms
        if run.record.form in WITHOUT_PROMPTS:
            raise DataError(
                f"{path} was trained on plain text, which has no prompts to answer; use msplora "
                f"generate --prompt."
            )
        if run.settings.task == "dpo":
            found = read_prompts(rows, forms, run.settings.data)
        else:
            found, _ = read_more_sft(str(file), forms, run.settings.data, unanswered=True)
        # All of them first: one that cannot be answered is not to cost the answers before it.
        asked = [prompt_to_continue(run, sample) for sample in found]
        return [
            {"row": number, "completion": continue_prompt(run, ids, max_new_tokens)}
            for number, ids in enumerate(asked, 1)
        ]


def check_output(file: Path, force: bool, given: Path) -> None:
    """Refuse an output that exists, cannot be written, has no known suffix or is the input."""
    if file.suffix not in (".jsonl", ".tsv"):
        raise ConfigError(f"--output {file}: name it .jsonl or .tsv.")
    if file.exists() and not force:
        raise ConfigError(f"--output {file} exists; name another file, or pass --force.")
    if file.exists() and file.samefile(given):
        raise ConfigError(f"--output {file} is the file of the rows itself; name another file.")
    parent = file.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"--output {file}: {parent} is not a folder that can be written to.")


def format_predictions(found: list[Prediction], suffix: str) -> str:
    """Return the predictions as .jsonl, or as .tsv with one column per class."""
    if suffix == ".jsonl":
        lines = [json.dumps(its, ensure_ascii=False) for its in found]
    else:
        records = [_flat(its) for its in found]
        lines = ["\t".join(records[0]), *("\t".join(map(_cell, its.values())) for its in records)]
    text = "\n".join(lines) + "\n"
    # The name of a file need not be UTF-8.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_predictions(found: list[Prediction], file: Path) -> None:
    """Write the predictions beside `file`, then give them its name."""
    partial = file.with_name(file.name + ".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(format_predictions(found, file.suffix), encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(
            f"--output {file} could not be written: {error}. Free some space, or name another file."
        ) from error


def _classify(run: SavedRun, rows: list[Any], batch_size: int) -> Iterator[Prediction]:
    classes = run.record.classes
    assert classes
    # Every row gets its line, so none is dropped here.
    limit = row_limit(run.settings, run.base.model)
    limit = Limit(limit.positions, limit.length or limit.positions, "truncate")
    asked = examples(rows, fit_columns(rows, classes), labelled=False)
    data, _ = tokenise_examples(asked, run.base.tokenizer, limit, "given")
    batches = (
        run.base.tokenizer.pad(data[start : start + batch_size], return_tensors="pt")
        for start in range(0, len(data), batch_size)
    )
    for number, its in enumerate(_logits(run, batches), 1):
        yield {"row": number, **_said(its, classes)}


def _classify_images(run: SavedRun, path: Path | str, batch_size: int) -> Iterator[Prediction]:
    classes = run.record.classes
    assert classes
    rows = read_more_images(path, classes, labelled=False)
    images = labelled_images(rows, classes, labelled=False)
    batches = DataLoader(Pixels(images, run.base.tokenizer), batch_size)
    for number, (image, its) in enumerate(zip(images, _logits(run, batches), strict=True), 1):
        named = {"image": image.source} if isinstance(image.source, str) else {}
        yield {"row": number, **named, **_said(its, classes)}


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


def _flat(found: Prediction) -> dict[str, Any]:
    probabilities = found.get("probabilities", {})
    plain = {key: value for key, value in found.items() if key != "probabilities"}
    return plain | {f"probability of {name}": value for name, value in probabilities.items()}


def _cell(value: Any) -> str:
    """A field of a TSV: nothing quotes there, so separators become visible escapes."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
