"""What an analysis finds, as frozen values that JSON can hold; a figure without a meaning is None.

docs/analysis.md says what each figure means, its formula and its source.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Number = float | None
Numbers = tuple[Number, ...]
Matrix = tuple[Numbers, ...]


@dataclass(frozen=True)
class Measures:
    """Of one update, s B A, or of the sum of all levels'."""

    norm: float
    """Frobenius."""
    share: Number
    """Of the sum of the levels' squared norms; 1 for the sum itself, None where all are zero."""
    effective_rank: float
    stable_rank: float
    numerical_rank: int
    singular_values: tuple[float, ...]
    """Largest first; as many as the rank allows."""
    relative_norm: Number = None
    """The norm over that of W0, where the base was given and has it."""


@dataclass(frozen=True)
class Intruders:
    """Which of the adapted weight's leading singular vectors the base's has nothing like."""

    cosines: tuple[float, ...]
    """For each of the leading left singular vectors of W0 + ΔW, largest singular value first: the
    largest |cosine| with any of W0's."""
    threshold: float

    @property
    def count(self) -> int:
        """The vectors whose largest cosine is below the threshold."""
        return sum(its < self.threshold for its in self.cosines)


@dataclass(frozen=True)
class SiteResult:
    """One adapted weight."""

    key: str
    layer: int | None
    update: Measures
    levels: Mapping[str, Measures]
    base_norm: float | None = None
    """The Frobenius norm of W0, where the base was given and has it."""
    intruders: Intruders | None = None

    @property
    def relative_norm(self) -> Number:
        """‖ΔW‖ / ‖W0‖."""
        return self.update.relative_norm


@dataclass(frozen=True)
class Similarity:
    """How alike the updates of a kind's layers are, or of two adapters' layers."""

    cosine: Matrix
    """⟨ΔW_i, ΔW_j⟩ / (‖ΔW_i‖ ‖ΔW_j‖)."""
    columns: Matrix
    """Mean squared cosine of the principal angles between the column spaces."""
    rows: Matrix
    """The same of the row spaces."""
    principal_columns: Numbers
    """The k-th largest cosine of the principal angles between column spaces, mean over pairs."""
    principal_rows: Numbers
    random_columns: Number
    """What `columns` of two layers would be, in expectation, of random spaces of these ranks: a
    mean over the pairs that have a value."""
    random_rows: Number
    random_principal_columns: Numbers
    """What `principal_columns` would be of random spaces of these ranks: a mean over draws."""
    random_principal_rows: Numbers


@dataclass(frozen=True)
class Shared:
    """For k = 1 …: how much of all layers' squared norms one shared thing of rank k explains."""

    columns: Numbers
    """One space of outputs, with each layer's own rows."""
    rows: Numbers
    """One space of inputs, with each layer's own columns."""
    pair: Numbers
    """One pair (A, B), the same update for every layer, as a pyramid's first level."""
    random_columns: Numbers
    """What `columns` would be of updates with these singular values and random singular vectors: a
    mean over draws."""
    random_rows: Numbers
    random_pair: Numbers


@dataclass(frozen=True)
class LevelOverlap:
    """How much of one level's update lies in the span of others', layer by layer."""

    level: str
    of: tuple[str, ...]
    columns: Numbers
    """Share of the squared norm within the others' column space."""
    rows: Numbers
    random_columns: Number
    """What a random update would have, in expectation: the dimension of the space over O, a mean
    over the layers that have a value."""
    random_rows: Number
    cosine: Numbers
    """Of the two updates, where `of` is one level."""


@dataclass(frozen=True)
class KindResult:
    """The weights of one place in the block."""

    name: str
    out_features: int
    in_features: int
    sites: tuple[SiteResult, ...]
    similarity: Similarity | None
    """None where the kind has one layer, or none of its updates is anything but zero."""
    shared: Shared | None
    decoupling: tuple[LevelOverlap, ...]

    @property
    def relative_norm(self) -> Number:
        """‖ΔW‖ / ‖W0‖, mean over the layers."""
        return mean(site.relative_norm for site in self.sites)

    @property
    def intruders(self) -> tuple[int, int] | None:
        """How many intruders there are in all layers, and among how many vectors."""
        found = [site.intruders for site in self.sites if site.intruders is not None]
        if not found:
            return None
        return sum(its.count for its in found), sum(len(its.cosines) for its in found)

    def likeness(self) -> tuple[Number, Number, Number]:
        """Cosine, overlap of columns and of rows: means over the pairs of different layers."""
        if self.similarity is None:
            return None, None, None
        of = self.similarity
        cosine, columns, rows = (_mean_beside(its) for its in (of.cosine, of.columns, of.rows))
        return cosine, columns, rows


@dataclass(frozen=True)
class LevelSummary:
    """One level over all weights."""

    level: str
    norm: float
    """Root mean square over the weights."""
    share: Number
    """Of the levels' squared norms, over all weights together."""
    effective_rank: Number
    """Mean over the weights where the level is not zero."""
    stable_rank: Number
    rank: int
    """The largest its factors have."""


@dataclass(frozen=True)
class Checkpoint:
    """An adapter as it was during training."""

    step: int
    levels: tuple[LevelSummary, ...]
    coarser_columns: Number
    """How much of the last level lies in the column space of those before it, mean."""
    coarser_rows: Number


@dataclass(frozen=True)
class SwitchedOff:
    """The loss on the rows without some levels."""

    levels: tuple[str, ...]
    """Which are off; none is the adapter as it is."""
    loss: float
    change: float
    """The loss less that of the whole adapter."""
    low: float
    """95 % of bootstrap samples of the rows have a change of at least … """
    high: float
    """… and at most."""


@dataclass(frozen=True)
class Ablation:
    """What each level is worth on data: what it learned of rows it was trained on says less."""

    data: str
    rows: int
    unit: str
    """What the loss is a mean over: "token", "row" or "pair"."""
    runs: tuple[SwitchedOff, ...]
    left_out: Mapping[str, int] = field(default_factory=dict[str, int])
    """How many rows did not stay whole, by what became of them, as `msplora eval` names it."""


@dataclass(frozen=True)
class AdapterResult:
    """One adapter."""

    name: str
    path: str
    method: str
    base: str | None
    parameters: int
    levels: tuple[LevelSummary, ...]
    kinds: tuple[KindResult, ...]
    history: tuple[Checkpoint, ...]
    ablation: Ablation | None
    notes: tuple[str, ...]

    def inside_coarser(self, level: str) -> tuple[Number, Number]:
        """How much of a level lies in the span of all before it, columns and rows: means."""
        found = self._within_coarser(level)
        return (
            mean(value for its in found for value in its.columns),
            mean(value for its in found for value in its.rows),
        )

    def random_inside_coarser(self, level: str) -> tuple[Number, Number]:
        """What that would be of random updates: each layer that has a value counts, as there."""
        found = self._within_coarser(level)
        return (
            mean(its.random_columns for its in found for value in its.columns if value is not None),
            mean(its.random_rows for its in found for value in its.rows if value is not None),
        )

    def _within_coarser(self, level: str) -> list[LevelOverlap]:
        before = tuple(its.level for its in self.levels)
        before = before[: before.index(level)]
        return [
            its
            for kind in self.kinds
            for its in kind.decoupling
            if its.level == level and its.of == before
        ]


@dataclass(frozen=True)
class KindComparison:
    """Two adapters' updates of the same weights, layer by layer."""

    kind: str
    layers: tuple[int | None, ...]
    cosine: Numbers
    columns: Numbers
    rows: Numbers
    random_columns: Number
    """What `columns` would be, in expectation, of random spaces of these ranks: a mean over the
    layers that have a value."""
    random_rows: Number


@dataclass(frozen=True)
class Comparison:
    """Two adapters of one base, by the weights that both adapt."""

    first: str
    second: str
    kinds: tuple[KindComparison, ...]
    notes: tuple[str, ...] = ()
    """What was left out and why, and other things that the reader should know, in sentences."""


@dataclass(frozen=True)
class Analysis:
    """Everything found; `to_dict`, `to_json` and `write` give it away."""

    adapters: tuple[AdapterResult, ...]
    comparisons: tuple[Comparison, ...]
    version: str
    """Of msplora."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can write it."""
        return _plain(self)

    def to_json(self) -> str:
        """Everything, as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """One page that needs no other file."""
        from .page import render

        return render(self)

    def write(self, output: str | Path, *, force: bool = False) -> list[Path]:
        """Write the page to a file that ends in .html or .htm; or page and JSON to a folder.

        Args:
            output: the file or folder.
            force: replace the files that are there.

        Returns:
            The files written.

        Raises:
            OutputError: something is there already, or it cannot be written.
        """
        from .output import write

        return write(self, Path(output), force)


def numbers(values: Tensor) -> Numbers:
    """A vector's numbers; None for what is not a number."""
    return tuple(None if math.isnan(its) else its for its in values.tolist())


def matrix(values: Tensor) -> Matrix:
    """A matrix's numbers, row by row."""
    return tuple(numbers(row) for row in values)


def mean(values: Iterable[Number]) -> Number:
    """The mean of what is not None."""
    found = [its for its in values if its is not None]
    return fmean(found) if found else None


def _mean_beside(values: Matrix) -> Number:
    """The mean of what is not on the diagonal."""
    return mean(its for i, row in enumerate(values) for j, its in enumerate(row) if i != j)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        content = {its.name: _plain(getattr(value, its.name)) for its in dataclasses.fields(value)}
        for name in _DERIVED.get(type(value), ()):
            content[name] = _plain(getattr(value, name))
        return content
    if isinstance(value, Mapping):
        return {key: _plain(its) for key, its in value.items()}
    return [_plain(its) for its in value] if isinstance(value, tuple) else value


_DERIVED: dict[type, tuple[str, ...]] = {
    SiteResult: ("relative_norm",),
    Intruders: ("count",),
    KindResult: ("relative_norm", "intruders"),
}
"""Properties that stand beside the fields in JSON."""
