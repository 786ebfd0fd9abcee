"""What each level is worth on data: the loss with it switched off, alone, in pairs, and all.

This is the one part that loads a model. A level is off where its B is zero; the head and all else
that was trained stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, default_data_collator

from msplora.loading import BaseOptions
from msplora.page.environment import short
from msplora.train.data_files import check_named
from msplora.train.evaluation import image_rows, pair_judge, pair_rows, text_rows, token_rows
from msplora.train.held_out_loss import autocast, counted_pieces, pad_rows
from msplora.train.lengths import LEFT_OUT
from msplora.train.levels import level_parameters
from msplora.train.quiet import quiet_libraries
from msplora.train.saved_run import SavedRun, open_run
from msplora.train.sft import padding_id
from msplora.train.tokenise_sft import IGNORED

from .results import Ablation, SwitchedOff

SAMPLES = 1000
"""Of the bootstrap."""
_INTERVAL = (0.025, 0.975)
_UNITS = {"sft": "token", "dpo": "pair"}

_ADAPTER = "default"

Losses = tuple[Tensor, Tensor]
"""Of each row: the sum of its losses, and how many there are; float64 (rows,)."""


def switch_off(
    path: Path | str,
    data: str,
    base: BaseOptions | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Ablation:
    """Measure a run or an adapter with all levels, and without some of them.

    Args:
        path: its folder.
        data: labelled rows, as `msplora eval` takes them.
        base: the base model, where the recorded one has moved, or how to load it.
        report: told how many of the measurements are done.

    Raises:
        MSPLoraError: the model or the data cannot be read.
    """
    check_named(data)
    with quiet_libraries():
        run = open_run(path, base)
        measure, left_out = _measurement(run, data)
        levels = _levels(run.model)
        sets = [()] + [its for count in (1, 2) for its in combinations(levels, count)]
        if len(levels) > 2:
            sets.append(tuple(levels))
        found: list[tuple[tuple[str, ...], Losses]] = []
        for off in sets:
            with _without([its for level in off for its in levels[level]]):
                found.append((off, measure()))
            report(len(found), len(sets))
    whole = found[0][1]
    return Ablation(
        data=data,
        rows=len(whole[0]),
        unit=_UNITS.get(run.settings.task, "row"),
        runs=tuple(_switched_off(off, losses, whole) for off, losses in found),
        left_out=left_out,
    )


def left_out_in_words(ablation: Ablation) -> str:
    """What rows did not stay whole, in a sentence."""
    parts = [f"{count} {LEFT_OUT[name]}" for name, count in ablation.left_out.items()]
    return f"Not all rows of {short(ablation.data)} are whole: {', '.join(parts)}."


def _switched_off(off: tuple[str, ...], losses: Losses, whole: Losses) -> SwitchedOff:
    loss = float(losses[0].sum() / losses[1].sum())
    low, change, high = _change(losses[0] - whole[0], whole[1])
    return SwitchedOff(off, loss, change, low, high)


def _change(differences: Tensor, counts: Tensor) -> tuple[float, float, float]:
    """The mean difference, between the ends of its bootstrap interval over the rows."""
    generator = torch.Generator().manual_seed(0)
    rows = len(differences)
    means = []
    for _ in range(SAMPLES):
        drawn = torch.randint(rows, (rows,), generator=generator)
        means.append(differences[drawn].sum() / counts[drawn].sum().clamp_min(1))
    low, high = torch.stack(means).quantile(torch.tensor(_INTERVAL, dtype=torch.float64)).tolist()
    return low, float(differences.sum() / counts.sum()), high


def _levels(model: Any) -> dict[str, list[nn.Parameter]]:
    """Level → its B; of a plain LoRA, all of its B as one level."""
    config: Any = model.peft_config[_ADAPTER]
    if hasattr(config, "pyramid"):
        return {level: its[1::2] for level, its in level_parameters(model).items()}
    of_lora = [
        parameter
        for name, parameter in model.named_parameters()
        # Not of the adapter that a run on preferences is compared with.
        if f".lora_B.{_ADAPTER}." in name or name.endswith(f".lora_embedding_B.{_ADAPTER}")
    ]
    return {"lora": of_lora}


@contextmanager
@torch.no_grad()
def _without(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.zero_()
        yield
    finally:
        for parameter, its in zip(parameters, kept, strict=True):
            parameter.copy_(its)


def _measurement(run: SavedRun, data: str) -> tuple[Callable[[], Losses], dict[str, int]]:
    """What measures the model as it is at that moment, row by row; and what rows are not whole."""
    size = run.settings.training.eval_batch_size
    if run.settings.task == "sft":
        rows, report = token_rows(run, data)
        rows = sorted(rows, key=lambda row: len(row.input_ids))
        pad = padding_id(run.base.tokenizer)
        batches = [pad_rows(rows[at : at + size], pad) for at in range(0, len(rows), size)]
        return (
            lambda: _measured(_of_tokens(run, *batch) for batch in batches),
            report.left_out(),
        )
    if run.settings.task == "dpo":
        pairs, report = pair_rows(run, data)
        judge = pair_judge(run, pairs, size)
        return lambda: _each_counts(judge.losses()), report.left_out()
    rows_of: Any
    if run.settings.task == "image-classification":
        rows_of, left_out, collate = image_rows(run, data), {}, default_data_collator
    else:
        rows_of, report = text_rows(run, data)
        left_out, collate = report.left_out(), DataCollatorWithPadding(run.base.tokenizer)

    def measure() -> Losses:
        places = range(0, len(rows_of), size)
        parts = ([rows_of[its] for its in range(at, min(at + size, len(rows_of)))] for at in places)
        return _measured(_of_labels(run, collate(part)) for part in parts)

    return measure, left_out


def _measured(batches: Iterator[Losses]) -> Losses:
    sums, counts = zip(*batches, strict=True)
    return torch.cat(sums), torch.cat(counts)


@torch.no_grad()
def _of_tokens(run: SavedRun, ids: Tensor, mask: Tensor, labels: Tensor) -> Losses:
    device = next(run.model.parameters()).device
    ids, mask, labels = (its.to(device) for its in (ids, mask, labels))
    with autocast(device.type, run.base.arithmetic):
        logits = run.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    losses = [
        F.cross_entropy(scores, token, reduction="none").double().cpu()
        for scores, token in counted_pieces(logits, labels)
    ]
    counts = (labels[:, 1:] != IGNORED).sum(-1).cpu()
    by_row = torch.cat(losses).split(counts.tolist())
    return torch.stack([its.sum() for its in by_row]), counts.double()


@torch.no_grad()
def _of_labels(run: SavedRun, batch: Any) -> Losses:
    device = next(run.model.parameters()).device
    inputs = {name: its.to(device) for name, its in batch.items()}
    labels = inputs.pop("labels")
    with autocast(device.type, run.base.arithmetic):
        logits = run.model(**inputs).logits.float()
    assert run.record.classes
    if run.record.classes.regression:
        losses = F.mse_loss(logits.squeeze(-1), labels.float(), reduction="none")
    else:
        losses = F.cross_entropy(logits, labels, reduction="none")
    return _each_counts(losses.double().cpu())


def _each_counts(losses: Tensor) -> Losses:
    """Rows of one loss each."""
    return losses, torch.ones_like(losses)
