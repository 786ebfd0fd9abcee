"""Whether a point fits in memory, asked before any of it is built.

The estimate is of what a step holds, from above; a test compares it with measured peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from msplora.errors import MSPLoraError

from .methods import METHODS, PYRAMID_RANKS, VERA_RANK
from .points import Point, SitePoint
from .size_points import FilePoint, InjectPoint, ValuesPoint

_BYTES = {"float32": 4, "bfloat16": 2}
_GIB = 2**30
_CACHED = ("inactive_file ", "active_file ")
_ROOM = 0.9
"""How much of what is free a point may need: allocators leave gaps."""


@dataclass(frozen=True)
class Need:
    """The bytes of a point, of all its methods together."""

    weights: int
    """The base once, and a copy for each method that trains every weight."""
    training: int
    """What trains beside the base's weights, with gradients and the optimiser's two moments."""
    activations: int
    """Of one step: methods take turns, so it is that of the most demanding one."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = [f"{field.name} {_gib(getattr(self, field.name))}" for field in fields(self)]
        return f"{_gib(self.total)} GiB ({', '.join(parts)})"


def _gib(number: int) -> str:
    return f"{number / _GIB:,.1f}"


def need_of(point: Point, methods: Sequence[str], device: str = "cpu") -> Need:
    """Estimate what the methods need, sharing one base."""
    size = _BYTES[point.precision.base]
    whole = sum(METHODS[name].whole for name in methods)
    adapted = [name for name in methods if METHODS[name].adapt is not None]
    numbers = point.its_shape.parameters(point.layers)
    sites = point.its_shape.sites(point.targets)
    sides = sum(inputs + outputs for inputs, outputs in sites)
    # Value, gradient and two moments, in float32 at most.
    training = 16 * sides * point.layers * sum(PYRAMID_RANKS) * len(adapted)
    if "vera" in adapted:
        training += 4 * VERA_RANK * (max(i for i, _ in sites) + max(o for _, o in sites))
    return Need(
        weights=size * numbers * (1 + whole),
        training=training + 3 * size * numbers * whole,
        activations=max(_activations(point, name, device) for name in methods),
    )


def _activations(point: Point, method: str, device: str) -> int:
    """Of a step with a method: everything that its backward pass reads, and what that makes."""
    shape, size = point.its_shape, _BYTES[point.precision.base]
    block = size * (10 * shape.hidden + 5 * shape.queries + 3 * shape.intermediate)
    if shape.family == "llama":  # its norms are computed in float32; one more wide product
        block += 16 * shape.hidden + size * shape.intermediate
    if METHODS[method].adapt is not None:
        mixed = size == 2 and point.precision.adapters_in_float32
        adapter_size = 4 if mixed else size
        copies = adapter_size * mixed
        if point.dropout:
            mask = 1 if device == "cuda" else adapter_size
            copies += (adapter_size + mask) * (3 if method == "branches" else 1)
        block += copies * sum(inputs for inputs, _ in shape.sites(point.targets))
    kept = block * point.layers
    if point.checkpointing != "none":
        kept = size * shape.hidden * point.layers + block
    return point.tokens * (kept + 4 * size * shape.hidden)


def available_bytes(device: str = "cpu") -> int | None:
    """What is free; None where the system does not say."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    found = [its for its in (_machine_bytes(), _container_bytes()) if its is not None]
    return min(found) if found else None


def _machine_bytes() -> int | None:
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    found = [int(its.split()[1]) * 1024 for its in lines if its.startswith("MemAvailable:")]
    return found[0] if found else None


def _container_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container may still take, which the machine's own numbers do not know of."""
    try:
        most = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no container, or no limit ("max")
        return None
    # Pages of files that were read count as used, and are given up when they are wanted.
    cached = sum(int(its.split()[1]) for its in lines if its.startswith(_CACHED))
    return most - max(used - cached, 0)


def check_fits(points: Sequence[Point], methods: Sequence[str], device: str = "cpu") -> None:
    """Refuse a sweep one of whose points does not fit.

    Raises:
        MSPLoraError: with what the first such point needs, what there is, and what to do.
    """
    available = available_bytes(device)
    if available is None:
        return
    for point in points:
        need = need_of(point, methods, device)
        if need.total > _ROOM * available:
            _refuse(str(point), methods, need, available, device)


def _refuse(point: str, methods: Sequence[str], need: Need, available: int, device: str) -> None:
    advice = f"{Point.smaller}, use --checkpointing non-reentrant"
    if any(METHODS[name].whole for name in methods):
        advice += ", or leave out the method full, which copies every weight"
    where = "on the GPU" if device == "cuda" else "on this machine"
    raise MSPLoraError(
        f"{point} with {', '.join(methods)} needs about {need}, and {_gib(available)} GiB are free "
        f"{where}. {advice}."
    )


def check_sites_fit(points: Sequence[SitePoint], device: str = "cpu") -> None:
    """The same for single layers.

    Raises:
        MSPLoraError: a layer does not fit.
    """
    available = available_bytes(device)
    for point in points:
        sides = point.inputs + point.outputs
        # Six methods with an input and a gradient each; the weight once; what one step makes.
        need = 4 * (8 * point.tokens * 2 * sides + point.inputs * point.outputs)
        if available is not None and need > _ROOM * available:
            raise MSPLoraError(
                f"the site {point} needs about {_gib(need)} GiB, and {_gib(available)} GiB are "
                f"free. {point.smaller}."
            )


def check_sizes_fit(points: Sequence[InjectPoint | FilePoint | ValuesPoint]) -> None:
    """The same for what `msplora bench size` measures.

    Raises:
        MSPLoraError: a model or a matrix does not fit.
    """
    available = available_bytes()
    for point in points:
        need = point.needed_bytes
        if available is not None and need > _ROOM * available:
            raise MSPLoraError(
                f"{point} needs about {_gib(need)} GiB, and {_gib(available)} GiB are free. "
                f"{point.smaller}."
            )
