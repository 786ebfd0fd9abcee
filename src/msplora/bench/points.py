"""One point of a sweep: what is measured, and every check that needs no model. No torch here."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from msplora.errors import MSPLoraError, nearest

from .shapes import TARGETS, Shape, shape_named


@dataclass(frozen=True)
class Precision:
    """In what the numbers of a step are held and multiplied."""

    base: str
    """Of the base model and its head, a name of torch's."""
    adapters_in_float32: bool
    """PEFT's default for adapters on a half-precision base."""
    autocast: bool = False
    """Under bfloat16 autocast, as trainers step with `bf16=True`."""


DTYPES = {
    "float32": Precision("float32", adapters_in_float32=True),
    "bfloat16": Precision("bfloat16", adapters_in_float32=True),
    "bfloat16-pure": Precision("bfloat16", adapters_in_float32=False),
    "bfloat16-autocast": Precision("bfloat16", adapters_in_float32=True, autocast=True),
}
CHECKPOINTING = ("none", "reentrant", "non-reentrant")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Point:
    """Everything that methods measured together have in common; also the keys of their rows."""

    shape: str
    layers: int
    targets: str
    dtype: str
    batch: int
    length: int
    dropout: float = 0.0
    """Of the adapters; the base has its configuration's own."""
    checkpointing: str = "none"
    compiled: bool = False

    smaller: ClassVar[str] = "Lower --batch, --length or --layers"
    """What to do where it does not fit."""

    def __post_init__(self) -> None:
        """Refuse names that are not known and numbers that the shape cannot have."""
        shape = shape_named(self.shape)
        check_name("targets", self.targets, TARGETS)
        check_name("dtype", self.dtype, DTYPES)
        check_name("checkpointing", self.checkpointing, CHECKPOINTING)
        for name in ("layers", "batch", "length"):
            if getattr(self, name) < 1:
                raise MSPLoraError(f"{name} is {getattr(self, name)}; it has to be at least 1.")
        if not 0 <= self.dropout < 1:
            raise MSPLoraError(f"dropout is {self.dropout}; it has to be at least 0, and below 1.")
        if self.length > shape.positions:
            raise MSPLoraError(
                f"length is {self.length}, but {shape.name} has {shape.positions} positions."
            )

    @property
    def its_shape(self) -> Shape:
        """The shape of that name."""
        return shape_named(self.shape)

    @property
    def precision(self) -> Precision:
        """The precision of that dtype."""
        return DTYPES[self.dtype]

    @property
    def tokens(self) -> int:
        """How many tokens a step takes."""
        return self.batch * self.length

    def keys(self) -> dict[str, Any]:
        """The point as the beginning of a row."""
        return asdict(self)

    def __str__(self) -> str:
        extras = [f"dropout {self.dropout:g}"] if self.dropout else []
        extras += [f"checkpointing {self.checkpointing}"] if self.checkpointing != "none" else []
        extras += ["compiled"] if self.compiled else []
        first = f"{self.shape}, {self.layers} layer{'s' * (self.layers > 1)}, {self.targets}"
        return ", ".join([first, self.dtype, f"{self.batch} × {self.length} tokens", *extras])


def point_of(row: dict[str, Any]) -> Point:
    """The point of a row of a result."""
    return Point(**{field.name: row[field.name] for field in fields(Point)})


def all_points(
    shapes: Sequence[str],
    layers: Sequence[int] | None,
    targets: Sequence[str],
    dtypes: Sequence[str],
    batches: Sequence[int],
    lengths: Sequence[int],
    dropouts: Sequence[float] = (0.0,),
    checkpointing: Sequence[str] = ("none",),
    compiled: bool = False,
) -> list[Point]:
    """The cartesian product, each point once; `layers` None takes each shape's own.

    Raises:
        MSPLoraError: a name or a number that does not go.
    """
    found = [
        Point(shape, layer_count, *rest, compiled=compiled)
        for shape in shapes
        for layer_count in layers or (shape_named(shape).layers,)
        for rest in itertools.product(targets, dtypes, batches, lengths, dropouts, checkpointing)
    ]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class SitePoint:
    """A layer's sides, how many tokens pass it, and in what precision."""

    inputs: int
    outputs: int
    tokens: int
    dtype: str

    smaller: ClassVar[str] = "Lower --tokens, or choose a smaller --site"

    def keys(self) -> dict[str, Any]:
        """The point as the beginning of a row."""
        own = asdict(self)
        return {"in": own.pop("inputs"), "out": own.pop("outputs"), **own}

    def __str__(self) -> str:
        return f"{self.inputs}→{self.outputs}, {self.tokens} tokens, {self.dtype}"


def site_points(
    sites: Sequence[str], tokens: Sequence[int], dtypes: Sequence[str]
) -> list[SitePoint]:
    """The points of sites such as "768x3072", in × out.

    Raises:
        MSPLoraError: a site that is not two numbers, or a number that is not positive.
    """
    found = []
    for text in sites:
        parts = text.lower().replace("×", "x").split("x")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise MSPLoraError(f"site {text!r} is not of the form INxOUT, such as 768x3072.")
        for count in tokens:
            if count < 1:
                raise MSPLoraError(f"tokens is {count}; it has to be at least 1.")
            found += [SitePoint(int(parts[0]), int(parts[1]), count, dtype) for dtype in dtypes]
    return list(dict.fromkeys(found))


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Raise an `MSPLoraError` that suggests the nearest unless `name` is one of `known`."""
    known = list(known)
    if name not in known:
        raise MSPLoraError(
            f"there is no {what} {name!r}.{nearest(name, known)} There are: {', '.join(known)}."
        )
