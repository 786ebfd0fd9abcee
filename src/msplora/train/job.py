"""A run made ready: everything has been read and checked, and nothing has been spent yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from .base_model import Base
from .data_check import DataCheck
from .methods import Adapted
from .task_record import TaskRecord


@dataclass
class Job:
    """What `run.train` needs of a task, whichever it is."""

    base: Base
    adapted: Adapted
    record: TaskRecord
    best: str
    """The metric that picks the checkpoint to keep."""
    held_out: bool
    """Whether there are held-out rows to judge by."""
    data_notes: list[str]
    sample: Text
    """One training row as the model will see it."""
    make_trainer: Callable[[Path], Any]
    """Make the trainer, which saves its checkpoints in the folder given."""
    check: DataCheck | None = None
    """What was found in the rows, for data.json; None where the task has no check."""
