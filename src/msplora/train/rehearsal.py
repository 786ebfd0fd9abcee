"""The dearest steps that a run can have to take: on its longest rows, then their evaluation.

It is the run's own trainer that steps: the same code, whether on tensors without storage, to
estimate its memory, or on real ones, to measure it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
from torch import Tensor
from torch.utils.data import ConcatDataset, SequentialSampler, Subset
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .adalora import averages, is_adalora
from .callbacks import add_rank_callbacks
from .settings import Settings
from .weightless_quantised import scales

STEPS = 2
"""The optimiser makes its state in the first; the second is like all that follow."""

RUN_STEPS = 10**9
"""How long a run is, to methods that divide it into phases and refuse a short one. So the steps are
of the first phase, in which averages are kept and ranks stay, unless their section skips it."""

MICRO_BATCHES = 2
"""Batches per step, at most: gradients are held from the second on, however many there are."""


@dataclass(frozen=True)
class Rows:
    """What the trainer would train on, packed where rows are packed."""

    count: int
    tokens: int
    longest: int


@contextmanager
def rehearsed(settings: Settings) -> Iterator[None]:
    """Set what the trainer is made with, for a rehearsal instead of the whole run."""
    training = settings.training
    before = training.max_steps, training.gradient_accumulation, training.report_to
    training.max_steps = STEPS
    training.gradient_accumulation = min(training.gradient_accumulation, MICRO_BATCHES)
    training.report_to = []  # no tracker is to take it for the run
    try:
        yield
    finally:
        training.max_steps, training.gradient_accumulation, training.report_to = before


class Rehearsal:
    """A trainer that was made while its settings were `rehearsed`.

    Args:
        trainer: the trainer of the run; it keeps only its longest rows.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        arguments = trainer.args
        found = lengths(trainer.train_dataset)
        self.rows = Rows(len(found), sum(found), max(found))
        arguments.eval_strategy = IntervalStrategy.NO
        arguments.save_strategy = SaveStrategy.NO
        arguments.load_best_model_at_end = False
        add_rank_callbacks(trainer, trainer.settings, lambda _: None, RUN_STEPS)
        batches = STEPS * arguments.gradient_accumulation_steps
        rows = longest_rows(trainer.train_dataset, arguments.per_device_train_batch_size)
        trainer.train_dataset = _joined([rows] * batches)
        trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
        evaluated = arguments.per_device_eval_batch_size
        if hasattr(trainer, "held_out"):
            by_length = sorted(trainer.held_out, key=lambda row: len(row.input_ids), reverse=True)
            trainer.held_out = by_length[:evaluated]
            self.evaluates = bool(trainer.held_out)
        else:
            self.evaluates = trainer.eval_dataset is not None
            if self.evaluates:
                trainer.eval_dataset = longest_rows(trainer.eval_dataset, evaluated)

    def train(self) -> None:
        """Take the steps."""
        self.trainer.train()

    def evaluate(self) -> None:
        """Evaluate one batch."""
        self.trainer.evaluate()


def weights_of(trainer: Any) -> list[Tensor]:
    """What a trainer holds before its first step: its model, and a second one to compare with."""
    second = getattr(trainer, "ref_model", None)
    return [
        tensor
        for model in (trainer.model, second)
        if model is not None
        for tensor in (*model.parameters(), *model.buffers(), *scales(model))
    ]


def kept_between_steps(model: Any, optimizer: Any) -> list[Tensor]:
    """What stays from the first step on, beside the weights: the optimiser's state, in which are
    ElaLoRA's averages too, and AdaLoRA's averages."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    kept = [its for its in states if isinstance(its, Tensor)]
    return kept + averages(model) if is_adalora(model) else kept


def lengths(rows: Any) -> list[int]:
    """How much each row puts into a batch: its tokens, or all that its lists hold.

    Images, which are read one by one, are given to the model in one size: 1 each.
    """
    if not isinstance(rows, datasets.Dataset):
        return [1] * len(rows)
    names = ["input_ids"] if "input_ids" in rows.column_names else rows.column_names
    columns = [rows[name] for name in names]
    return [
        sum(len(value) for value in values if hasattr(value, "__len__"))
        for values in zip(*columns, strict=True)
    ]


def longest_rows(rows: Any, count: int) -> Any:
    """The `count` longest rows, longest first."""
    found = lengths(rows)
    order = sorted(range(len(found)), key=found.__getitem__, reverse=True)[:count]
    return rows.select(order) if isinstance(rows, datasets.Dataset) else Subset(rows, order)


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], datasets.Dataset):
        return datasets.concatenate_datasets(parts)
    return ConcatDataset(parts)
