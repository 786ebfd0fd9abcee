"""What an inspection finds, as frozen values that JSON can hold; None is a figure without meaning.

docs/inspecting.md says what each figure means and by which rule something is suspicious.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["problem", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """Something that the owner of the files should know."""

    rule: str
    """One of `suspicions.RULES`."""
    severity: Severity
    text: str
    """What was found and what to do, in a sentence or two."""
    where: tuple[str, ...] = ()
    """All the pairs, by address, or tensors, by name, that it is about."""


@dataclass(frozen=True)
class PairReport:
    """One (A, B): of a pyramid by its address, of a LoRA by its weight's path."""

    address: str
    level: str
    kind: str
    rank: int
    scale: float
    parameters: int
    layers: tuple[int, ...]
    """The numbers of the blocks that borrow it; empty where the file does not tell them."""
    norm: float | None
    """‖s·BA‖, Frobenius; None where its numbers are not finite or have no product."""
    relative_norm: float | None
    """The norm over that of an identity of the update's size, √min(out, in)."""
    zero: tuple[str, ...]
    """Which of "A" and "B" hold zeros only."""


@dataclass(frozen=True)
class LevelReport:
    """One level over all kinds."""

    level: str
    groups: int
    """As asked for; 0 is a pair per layer."""
    rank: int
    alpha: float
    scale: float
    pairs: int
    parameters: int
    norm: float | None
    """Root mean square over the adapted weights of ‖s·BA‖."""
    share: float | None
    """Of the sum of the levels' squared norms."""
    largest: float | None
    """The largest relative norm of a pair."""


@dataclass(frozen=True)
class KindReport:
    """The weights that could share: of one place inside the block, and of one shape."""

    kind: str
    out_features: int
    in_features: int
    layers: int | None
    """How many weights; None where the file does not tell."""
    ranks: tuple[int, ...]
    """Of each level; where a LoRA's `rank_pattern` gives layers ranks of their own, the most …"""
    lowest_ranks: tuple[int, ...]
    """… and the least."""
    group_sizes: tuple[tuple[int, ...], ...]
    """Of each level, how many layers share each of its pairs."""
    parameters: int


@dataclass(frozen=True)
class Inspection:
    """Everything found; `to_dict` and `to_json` give it away."""

    path: str
    """As it was given."""
    weights: str
    """The folder that holds the tensors."""
    what: Literal["MSPLoRA", "LoRA", "model"]
    found_as: str
    """How it comes: "adapter", "run", "unfinished run", "run's checkpoint of step 200",
    "converted from …"."""
    base: str | None
    """The base that the adapter names."""
    model_type: str | None
    """The architecture, where it is recorded."""
    task: str | None
    """PEFT's task type of an adapter, the class of a model."""
    files: Mapping[str, int]
    """The files of tensors, and their bytes."""
    dtypes: Mapping[str, int]
    """How many numbers are stored in each dtype."""
    parameters: int
    """In pairs; of a model, in all."""
    other_parameters: int
    """Of an adapter, in what is no low-rank pair: a head, biases, trained tokens, magnitudes."""
    levels: tuple[LevelReport, ...]
    kinds: tuple[KindReport, ...]
    pairs: tuple[PairReport, ...]
    findings: tuple[Finding, ...]
    version: str
    """Of msplora."""

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What keeps it from being loaded, or from doing anything."""
        return tuple(its for its in self.findings if its.severity == "problem")

    @property
    def suspicious(self) -> bool:
        """Whether there is more to say than notes."""
        return any(its.severity != "note" for its in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can write it: what is not finite as None."""
        return _finite(asdict(self)) | {"suspicious": self.suspicious}

    def to_json(self) -> str:
        """Everything, as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(its) for name, its in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value
