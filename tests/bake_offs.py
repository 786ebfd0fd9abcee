"""Bake-offs for the tests: a small one, and runs that are made up.

A made-up run has an accuracy that is a known function of its method, rate, task and seed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from msplora.bakeoff.bake_off import Outcome
from msplora.bakeoff.reading import BakeOff, Run, make_bake_off
from msplora.bakeoff.running import Job
from msplora.bakeoff.sizes import Prepared
from msplora.sweep.rows import Row

BEST = {"lora": 1e-3, "pyramid": 1e-2, "small": 1e-3}
"""The rate at which each made-up method does best."""
SPEC: dict[str, Any] = {
    "output": "out",
    "base": {
        "model": "encoder",
        "task": "classification",
        "data": {"validation_fraction": 0.25},
        "adapter": {"target_modules": ["query", "value"]},
        "training": {"epochs": 3, "batch_size": 8, "check_saved": False},
    },
    "tasks": {"one": {"data": {"train": "one.jsonl"}}, "two": {"data": {"train": "two.jsonl"}}},
    "methods": {
        "lora": {"method": "lora"},
        "pyramid": {"method": "msplora", "adapter": {"r": 8}},
        "small": {"method": "lora", "adapter": {"r": 4}},
    },
    "learning_rates": [1e-3, 1e-2, 1e-4],
    "choose": {"tasks": ["one"]},
    "seeds": [0, 1],
}


def spec(**changes: Any) -> BakeOff:
    return make_bake_off({**SPEC, **changes}, "spec.yaml")


def prepared(**changes: Any) -> Prepared:
    """Without looking at model and data."""
    bake_off = spec(**changes)
    sizes = {name: 1000 * (2 + place) for place, name in enumerate(bake_off.entrants)}
    return Prepared(bake_off, sizes, dict.fromkeys(bake_off.settings.tasks, "accuracy"))


def accuracy(method: str, rate: float, task: str, seed: int) -> float:
    far = abs(math.log10(rate / BEST.get(method, 1e-3)))
    return round(0.9 - 0.1 * far - 0.2 * (task == "two") - 0.01 * seed, 6)


class MadeUp:
    """Stands for `make_run`: three evaluations, each a little better than the one before."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails: set[str] = set()
        self.diverges: set[str] = set()
        self.is_killed: set[str] = set()
        """Runs whose process somebody ends."""
        self.commit = "abc"
        self.stop_after: int | None = None

    def __call__(self, job: Job, stop: Any, *_: Any) -> Row:
        row, its = job.row, job.row.parameters
        if len(self.ran) == self.stop_after:
            self.stop_after = None
            raise KeyboardInterrupt
        self.ran.append(row.name)
        row.seconds += 2.0
        if row.name in self.diverges:
            row.status, row.error = "diverged", "the loss is nan"
            return row
        if row.name in self.is_killed:
            row.status, row.error = "unfinished", "its process was ended by SIGKILL in /tmp/here"
            return row
        if row.name in self.fails:
            row.status, row.error = "failed", "out of memory"
            return row
        value = accuracy(its["method"], its["learning_rate"], its["task"], its["seed"])
        found = [
            {"epoch": float(step), "step": step, "accuracy": value - 0.1 * (3 - step)}
            for step in (1, 2, 3)
        ]
        for count in (1, 2, 3):
            if job.rejecting and job.rejecting.until_hopeless(found[:count], 3):
                row.status, row.evaluations, row.steps = "rejected", found[:count], 3
                return row
        row.status, row.metric, row.value = "complete", "accuracy", value
        row.evaluations, row.best, row.train_seconds = found, found[-1], 1.0
        row.resident_bytes = 2**20
        return row

    def note_origin(self, row: Row, settings: Any) -> None:
        """Stands for the function of this name."""
        row.commit, row.hardware, row.versions = self.commit, "a machine", {"msplora": "1"}


def rows_in(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(output, "results.jsonl").read_text().splitlines()]


def rates_of(outcome: Outcome) -> dict[str, float | None]:
    return {name: its.best.rate if its.best else None for name, its in outcome.choices.items()}


def names(runs: list[str], *parts: str) -> list[str]:
    return [name for name in runs if all(part in name.split(",") for part in parts)]


def content_of(bake_off: BakeOff, name: str) -> dict[str, Any]:
    task, method, rate, seed = name.split(",")
    run = Run(method, task, float(rate.partition("=")[2]), int(seed.partition("=")[2]))
    return bake_off.settings_of(run).to_dict()
