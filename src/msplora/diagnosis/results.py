"""What a diagnosis finds, as frozen values that JSON can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

Status = Literal["passed", "failed", "warning", "skipped"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    said: str
    """What was found."""
    advice: str = ""
    """What to do; empty where there is nothing to do."""
    figures: Mapping[str, float | int | None] = field(default_factory=dict)
    """The numbers behind it; None is one that is not finite."""


@dataclass(frozen=True)
class Diagnosis:
    """Every check; `to_dict` and `to_json` give them away."""

    model: str
    adapter: str
    method: str
    dtype: str
    """What the base's weights were loaded in."""
    inputs: str
    """What it was run on."""
    checks: tuple[Check, ...]
    version: str
    """Of msplora."""

    @property
    def ok(self) -> bool:
        """Whether no check failed; warnings are allowed."""
        return all(check.status != "failed" for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can write it."""
        return asdict(self) | {"ok": self.ok}

    def to_json(self) -> str:
        """Everything, as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def figures(**values: float) -> dict[str, float | None]:
    """Numbers for a check."""
    return {name: its if math.isfinite(its) else None for name, its in values.items()}


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, as users write it."""
    return str(dtype).removeprefix("torch.")


def percent(share: float) -> str:
    """A share, which is not called nothing where it is little."""
    return "under 0.01%" if 0 < share < 1e-4 else f"{share:.2%}"
