"""An adapter as its file holds it: pairs, and the weights that borrow them; no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class StoredPair:
    """One (A, B) of a file, as matrices with a product."""

    level: str
    group: int
    scale: float
    rank: int
    in_features: int
    out_features: int
    parameters: int
    """The numbers in the file's A and B: as matrices, those of grouped convolutions have zeros."""
    read: Callable[[], tuple[Tensor, Tensor]] = field(repr=False)
    """A (R, I) and B (O, R), from the file each time: they are not kept here."""


@dataclass(frozen=True)
class StoredSite:
    """One adapted weight."""

    key: str
    """Its path in the model; without the base, what the file tells of it."""
    layer: int | None
    """The number of its block, `None` outside every list of blocks."""
    pairs: tuple[int, ...]
    """Which of the kind's pairs it borrows, one per level."""


@dataclass(frozen=True)
class StoredKind:
    """The weights that could share: of one place inside the block, and of one shape."""

    name: str
    pairs: tuple[StoredPair, ...]
    sites: tuple[StoredSite, ...]
    """In depth order."""
    counted: bool = False
    """The numbers of the blocks are not known: they are counted from 0."""
    everywhere: bool = False
    """They are counted, and the config means all blocks that have such a weight."""
    unnamed: bool = False
    """Of a parameter of which the file does not say which of its module's it is."""

    @property
    def out_features(self) -> int:
        return self.pairs[0].out_features

    @property
    def in_features(self) -> int:
        return self.pairs[0].in_features

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of the weights as matrices, (out, in)."""
        return self.out_features, self.in_features


@dataclass(frozen=True)
class StoredAdapter:
    """All of an adapter that is the product of two factors."""

    path: Path
    method: str
    """ "MSPLoRA" or "LoRA"."""
    base: str | None
    """The base model that its config names."""
    levels: tuple[str, ...]
    kinds: tuple[StoredKind, ...]
    notes: tuple[str, ...]
    """What the reader of its figures should know, in sentences."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Of the factors in its file, by their names there."""
    fingerprint: str | None = None
    """The hash of the names and shapes of all weights that it adapts, as a plan has it."""

    @property
    def ranks(self) -> dict[str, int]:
        """Level → the largest rank that its factors have."""
        pairs = [pair for kind in self.kinds for pair in kind.pairs]
        return {
            level: max(pair.rank for pair in pairs if pair.level == level) for level in self.levels
        }

    @property
    def scales(self) -> dict[str, list[float]]:
        """Level → the scales of its pairs, smallest first."""
        pairs = [pair for kind in self.kinds for pair in kind.pairs]
        return {
            level: sorted(pair.scale for pair in pairs if pair.level == level)
            for level in self.levels
        }
