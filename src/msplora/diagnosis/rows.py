"""Real inputs for a diagnosis: the first rows of a file, as the adapter's task reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import DataCollatorWithPadding, default_data_collator

from msplora.errors import UnsupportedError
from msplora.train.data_files import check_named
from msplora.train.evaluation import image_rows, text_rows, token_rows
from msplora.train.held_out_loss import pad_rows
from msplora.train.quiet import quiet_libraries
from msplora.train.saved_run import SavedRun, open_run
from msplora.train.sft import padding_id

from .putting_on import put_on

ROWS = 8
"""Rows that are looked at."""


def model_and_rows(adapter: Path, base: str, data: str) -> tuple[PeftModel, dict[str, Tensor]]:
    """The adapted model as its run had it, and the first rows of a file.

    Raises:
        Misfit: the adapter does not fit the base.
        MSPLoraError: the model or the rows cannot be read, or it was trained on preferences.
    """
    check_named(data)
    with quiet_libraries():
        run = open_run(adapter, base, put_on)
        inputs = _inputs(run, data)
    device = next(run.model.parameters()).device
    return run.model, {name: its.to(device) for name, its in inputs.items() if name != "labels"}


def _inputs(run: SavedRun, data: str) -> dict[str, Tensor]:
    task = run.settings.task
    if task == "sft":
        rows, _ = token_rows(run, data)
        ids, mask, _ = pad_rows(rows[:ROWS], padding_id(run.base.tokenizer))
        return {"input_ids": ids, "attention_mask": mask}
    if task == "dpo":
        raise UnsupportedError(
            f"{run.path} was trained on preferences, which are no single rows. Leave --data out."
        )
    if task == "image-classification":
        images: Any = image_rows(run, data)
        return default_data_collator([images[place] for place in range(min(ROWS, len(images)))])
    texts: Any = text_rows(run, data)[0]
    collate = DataCollatorWithPadding(run.base.tokenizer)
    return dict(collate([texts[place] for place in range(min(ROWS, len(texts)))]))
