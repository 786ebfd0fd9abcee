"""Giving up a run whose learning rate is hopeless, by what the same method did with another."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msplora.sweep.rows import Row
from msplora.train.metric_order import sign_of
from msplora.train.progress import plain_metrics

from .settings import RejectSettings

Evaluations = Sequence[dict[str, Any]]
"""The metrics at each evaluation of a run, with its step."""


@dataclass(frozen=True)
class Rejecting:
    """The rule for one run.

    It depends on evaluations alone: where and when the runs were made changes nothing.
    """

    settings: RejectSettings
    metric: str
    rivals: Sequence[Evaluations]
    """The evaluations of the other rates that were tried before this one."""

    def until_hopeless(self, evaluations: Evaluations, steps: int) -> Evaluations:
        """The evaluations of a run of so many `steps` until the one that gives it up; none if none
        does. Later ones change nothing, so it is the same whenever one looks.
        """
        for count in range(1, len(evaluations) + 1):
            step = evaluations[count - 1]["step"]
            if step >= steps:
                break  # it is over already
            if step < self.settings.after * steps:
                continue
            others = max((self._best(its, step) for its in self.rivals), default=-math.inf)
            if self._best(evaluations[:count], step) < others - self.settings.behind:
                return evaluations[:count]
        return []

    def _best(self, evaluations: Evaluations, step: int) -> float:
        """The best value by a step, turned so that more is better."""
        sign = sign_of(self.metric)
        values = (sign * its[self.metric] for its in evaluations if its["step"] <= step)
        return max(values, default=-math.inf)


def best_until_then(row: Row, metric: str) -> float:
    """The best value of a run that was given up."""
    sign = sign_of(metric)
    return sign * max(sign * its[metric] for its in row.evaluations)


def evaluations_so_far(working: Path) -> tuple[list[dict[str, Any]], int]:
    """The evaluations in the newest checkpoint of an unfinished run, and the steps it will have.

    `working` is its folder while it trains. Without a checkpoint there are none, and 0 steps.
    """
    files = list(working.glob("checkpoints/checkpoint-*/trainer_state.json"))
    if not files:
        return [], 0
    newest = max(files, key=lambda file: int(file.parent.name.rpartition("-")[2]))
    try:
        state = json.loads(newest.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it is being written, or removed
        return [], 0
    found = [
        {"epoch": entry.get("epoch", 0.0), "step": entry["step"], **plain_metrics(entry)}
        for entry in state["log_history"]
        if "eval_loss" in entry and entry["step"] > 0
    ]
    return found, state["max_steps"]
