"""Batches of rows of like length, in an order that a resumed run finds again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class ResumableLengthSampler(LengthGroupedSampler):
    """transformers' sampler, with an order that depends on the seed and the epoch alone.

    Its own draws from the global random numbers. A run that is resumed within an epoch finds these
    in another state than they had when the epoch began, so its batches would be others.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        self.order = torch.Generator()
        super().__init__(batch_size, lengths=lengths, generator=self.order)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.order.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class GroupsByLength:
    """Put before a trainer, it takes the rows by length where `group_by_length` is set."""

    group_by_length = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.group_by_length:
            return super()._get_train_sampler(train_dataset)  # pyright: ignore
        rows = self.train_dataset if train_dataset is None else train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ResumableLengthSampler(batch, self.row_lengths(rows), self.args.seed)

    def row_lengths(self, rows: Any) -> list[int]:
        """The tokens of each training row."""
        return [len(ids) for ids in rows["input_ids"]]
