"""The memory that the rehearsal of a run really takes, on the device it would train on."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msplora.bench.memory import peak_live_bytes

from .job import Job
from .rehearsal import Rehearsal, kept_between_steps, rehearsed, weights_of


@dataclass(frozen=True)
class Measured:
    """Peaks, in bytes that tensors hold: of the steps, and of the evaluation."""

    training: int
    evaluation: int | None

    @property
    def peak(self) -> int:
        """The higher of the two."""
        return max(self.training, self.evaluation or 0)


def measure(job: Job) -> Measured:
    """Rehearse a job that has its real weights.

    On a CPU what tensors hold is read from torch's profiler; on a GPU from its allocator.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder, rehearsed(job.record.settings):
        trainer = job.make_trainer(Path(folder))
        rehearsal = Rehearsal(trainer)
        weights = _bytes_of(weights_of(trainer))
        training = weights + peak_live_bytes(rehearsal.train, device)
        if not rehearsal.evaluates:
            return Measured(training, None)
        kept = weights + _bytes_of(kept_between_steps(trainer.model, trainer.optimizer))
        return Measured(training, kept + peak_live_bytes(rehearsal.evaluate, device))


def _bytes_of(tensors: list[Any]) -> int:
    """The bytes of their storages, each once."""
    storages = {its.untyped_storage().data_ptr(): its.untyped_storage() for its in tensors}
    return sum(storage.nbytes() for storage in storages.values())
