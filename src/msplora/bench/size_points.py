"""What `msplora bench size` measures, and every check that needs no model. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from msplora.errors import MSPLoraError

from .methods import RANK
from .shapes import Shape, shape_named

# As one writes them: nothing but these lie in the models that are built here.
_QV = {"roberta": ["query", "value"], "llama": ["q_proj", "v_proj"]}


BLOCK = 2**20
"""Bytes of a block's modules in Python, from above."""


@dataclass(frozen=True)
class _ModelPoint:
    shape: str
    targets: str
    """qv or all-linear."""

    @property
    def its_shape(self) -> Shape:
        """The shape of that name."""
        return shape_named(self.shape)

    @property
    def target_modules(self) -> str | list[str]:
        """For a configuration."""
        return list(_QV[self.its_shape.family]) if self.targets == "qv" else self.targets


@dataclass(frozen=True)
class InjectPoint(_ModelPoint):
    """A model that adapters are put into."""

    layers: int

    smaller: ClassVar[str] = "Lower --layers"

    @property
    def needed_bytes(self) -> int:
        """What a model's modules take: on the meta device no numbers do."""
        return BLOCK * self.layers

    def keys(self) -> dict[str, Any]:
        """The point as the beginning of a row."""
        return {"what": "inject", **asdict(self)}

    def __str__(self) -> str:
        return f"inject: {self.shape}, {self.layers} layers, {self.targets}"


@dataclass(frozen=True)
class FilePoint(_ModelPoint):
    """A model whose adapters are saved and loaded."""

    smaller: ClassVar[str] = "Choose a smaller --file-shape"

    @property
    def needed_bytes(self) -> int:
        """Its numbers, which all methods share, and those of the adapters, once more as a file."""
        shape = self.its_shape
        sides = sum(inputs + outputs for inputs, outputs in shape.sites(self.targets))
        return 4 * (shape.parameters() + 3 * 2 * RANK * sides * shape.layers)

    def keys(self) -> dict[str, Any]:
        """The point as the beginning of a row."""
        return {"what": "file", **asdict(self)}

    def __str__(self) -> str:
        return f"file: {self.shape}, {self.targets}"


@dataclass(frozen=True)
class ValuesPoint:
    """A square update whose singular values are found."""

    side: int
    rank: int

    smaller: ClassVar[str] = "Lower --side or --rank"

    @property
    def needed_bytes(self) -> int:
        """The dense product in float32 and float64, what decomposes it, and the factors."""
        return 4 * self.side**2 + 4 * 8 * self.side**2 + 2 * (4 + 8) * self.side * self.rank

    def keys(self) -> dict[str, Any]:
        """The point as the beginning of a row."""
        shape = f"{self.side}x{self.side}"
        return {"what": "singular values", "shape": shape, "rank": self.rank}

    def __str__(self) -> str:
        return f"singular values: {self.side} × {self.side}, rank {self.rank}"


def inject_points(shape: str, layers: Sequence[int]) -> list[InjectPoint]:
    """The shape's own depth with both kinds of targets, and all linear layers at each depth.

    Raises:
        MSPLoraError: no such shape, or a depth below 1.
    """
    own = shape_named(shape).layers
    _check_at_least_1("layers", layers)
    depths = sorted({own, *layers})
    return [
        InjectPoint(shape, "qv", own),
        *(InjectPoint(shape, "all-linear", depth) for depth in depths),
    ]


def file_points(shape: str) -> list[FilePoint]:
    """Both kinds of targets.

    Raises:
        MSPLoraError: no such shape.
    """
    return [FilePoint(shape_named(shape).name, targets) for targets in ("qv", "all-linear")]


def values_points(side: int, ranks: Sequence[int]) -> list[ValuesPoint]:
    """One point for each rank.

    Raises:
        MSPLoraError: a side or rank below 1.
    """
    _check_at_least_1("side", [side])
    _check_at_least_1("rank", ranks)
    return [ValuesPoint(side, rank) for rank in dict.fromkeys(ranks)]


def _check_at_least_1(what: str, numbers: Sequence[int]) -> None:
    for number in numbers:
        if number < 1:
            raise MSPLoraError(f"{what} is {number}; it has to be at least 1.")
