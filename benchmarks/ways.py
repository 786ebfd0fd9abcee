"""Ways to share that the library does not have, and the layers they are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

ALPHA = 16
ROW = math.sqrt(1 / 3)
"""The length of a row of LoRA's A at the start, on average."""


@dataclass(frozen=True)
class Level:
    """Pairs of one rank: how many groups of layers have an A, and a B, of their own (0: each)."""

    rank: int
    a_groups: int
    b_groups: int
    between: Literal["", "number", "vector", "matrix"] = ""
    """What each layer has of its own between A and B: ones, or the identity, at first."""


@dataclass(frozen=True)
class Way:
    """Levels, and how they are made and trained."""

    levels: tuple[Level, ...]
    start: Literal["random", "orthogonal", "gradient"] = "random"
    """The rows of A: LoRA's; random, orthogonal to each other and to the levels above; or, level
    after level, where the first gradient of the layers that share them is largest, orthogonal to
    the levels above."""
    cuts: Literal["equal", "gradient"] = "equal"
    """Groups of layers next to each other: as large as each other, or of layers whose first
    gradients are alike."""
    penalty: float = 0.0
    """Weight of the squared cosines between the rows of different levels' A: their sum in a layer,
    the mean over the layers."""


def pyramid(*ranks: int, between: Any = "") -> tuple[Level, ...]:
    """Global, mid in three groups, local."""
    return tuple(
        Level(rank, groups, groups, between if groups else "")
        for rank, groups in zip(ranks, (1, 3, 0), strict=True)
    )


BASELINE = "LoRA, r = 6"
WAYS = {
    BASELINE: Way((Level(6, 0, 0),)),
    "pyramid 8, 4, 2": Way(pyramid(8, 4, 2)),
    "pyramid, shared pairs scaled per layer": Way(pyramid(8, 4, 2, between="number")),
    "pyramid, shared pairs gated per layer": Way(pyramid(8, 4, 2, between="vector")),
    "pyramid, shared pairs with a core per layer": Way(pyramid(6, 4, 2, between="matrix")),
    "pyramid, orthogonal at the start": Way(pyramid(8, 4, 2), start="orthogonal"),
    "pyramid, A from the gradient": Way(pyramid(8, 4, 2), start="gradient"),
    "pyramid, shared pairs gated per layer, A from the gradient": Way(
        pyramid(8, 4, 2, between="vector"), start="gradient"
    ),
    "LoRA, r = 6, A from the gradient": Way((Level(6, 0, 0),), start="gradient"),
    "pyramid, cut by the gradient": Way(pyramid(8, 4, 2), cuts="gradient"),
    "pyramid, levels held apart (0.1)": Way(pyramid(8, 4, 2), penalty=0.1),
    "pyramid, levels held apart (1)": Way(pyramid(8, 4, 2), penalty=1.0),
    "A shared by all, B per layer, r = 11": Way((Level(11, 1, 0),)),
    "A shared by all, B per layer, r = 11, A from the gradient": Way(
        (Level(11, 1, 0),), start="gradient"
    ),
    "B shared by all, A per layer, r = 9": Way((Level(9, 0, 1),)),
    "A shared by all and by groups, B per layer, r = 5 + 4": Way((Level(5, 1, 0), Level(4, 3, 0))),
    "A shared by all and by groups, B per layer, r = 5 + 4, A from the gradient": Way(
        (Level(5, 1, 0), Level(4, 3, 0)), start="gradient"
    ),
    "one pair for all, r = 30": Way((Level(30, 1, 1),)),
    "one pair for all, gated per layer, r = 28": Way((Level(28, 1, 1, "vector"),)),
    "one pair for all, a core per layer, r = 17": Way((Level(17, 1, 1, "matrix"),)),
    "global 10, local 4": Way((Level(10, 1, 1), Level(4, 0, 0))),
    "global 10 gated, local 4": Way((Level(10, 1, 1, "vector"), Level(4, 0, 0))),
    "A shared r = 5, local r = 3": Way((Level(5, 1, 0), Level(3, 0, 0))),
}


class Site(nn.Module):
    """A frozen layer and what its levels add: ``y = W x + Σ s B C A x``, C the layer's own."""

    def __init__(self, base: nn.Module, parts: Sequence[tuple[Any, Any, Any, float]]) -> None:
        super().__init__()
        self.base = base
        self.scales = [scale for *_, scale in parts]
        self.a = nn.ParameterList(a for a, *_ in parts)
        self.b = nn.ParameterList(b for _, b, *_ in parts)
        self.cores = nn.ParameterDict(
            {str(place): core for place, (_, _, core, _) in enumerate(parts) if core is not None}
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for place, (a_RI, b_OR, scale) in enumerate(zip(self.a, self.b, self.scales, strict=True)):
            inner = x @ a_RI.mT
            if str(place) in self.cores:
                core = self.cores[str(place)]
                inner = inner @ core.mT if core.dim() == 2 else inner * core
            y = y + scale * (inner @ b_OR.mT)
        return y


def put_on(model: nn.Module, way: Way, gradients: dict[str, Tensor]) -> list[Site]:
    """Replace the LoRA layers of a model; only what the way adds trains.

    `gradients`: of each layer's weight, (O, I), by its path; none where the way asks for none.
    """
    model.requires_grad_(False)
    kinds: dict[str, dict[str, Any]] = {}
    for path, its in model.named_modules():
        if isinstance(its, LoraLayer):
            kinds.setdefault(path.rpartition(".")[2], {})[path] = its.get_base_layer()
    sites = []
    for layers in kinds.values():
        slopes = [gradients[path] for path in layers] if gradients else None
        for (path, base), parts in zip(layers.items(), _parts(way, layers, slopes), strict=True):
            parent, _, name = path.rpartition(".")
            sites.append(Site(base, parts))
            setattr(model.get_submodule(parent), name, sites[-1])
    return sites


def _parts(
    way: Way, layers: dict[str, Any], slopes: Sequence[Tensor] | None
) -> list[list[tuple[Any, Any, Any, float]]]:
    """Of each layer of one kind: A, B, what is between and scale of each level."""
    base = next(iter(layers.values()))
    width, height, count = base.in_features, base.out_features, len(layers)
    found: list[list[tuple[Any, Any, Any, float]]] = [[] for _ in layers]
    for level in way.levels:
        a_of, b_of = (
            _groups(groups, count, slopes if way.cuts == "gradient" else None)
            for groups in (level.a_groups, level.b_groups)
        )
        a_factors, b_factors = {}, {}
        for group in sorted(set(a_of)):
            its = [place for place in range(count) if a_of[place] == group]
            a_RI = torch.empty(level.rank, width)
            nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5))
            above = [a for place in its for a, *_ in found[place]]
            if way.start == "gradient" and slopes is not None:
                a_RI = ROW * _steepest(sum(slopes[place] for place in its), level.rank, above)
            elif way.start == "orthogonal":
                a_RI = ROW * _anywhere(level.rank, width, above)
            a_factors[group] = nn.Parameter(a_RI)
        for group in set(b_of):
            b_factors[group] = nn.Parameter(torch.zeros(height, level.rank))
        for place in range(count):
            core = _between(level)
            # One alpha, split between the levels: all ways step alike at one rate.
            scale = ALPHA / len(way.levels) / level.rank
            found[place].append((a_factors[a_of[place]], b_factors[b_of[place]], core, scale))
    return found


def _between(level: Level) -> nn.Parameter | None:
    """A layer's own part between A and B, which changes nothing at first."""
    ones = {
        "number": torch.ones(1),
        "vector": torch.ones(level.rank),
        "matrix": torch.eye(level.rank),
    }
    return nn.Parameter(ones[level.between]) if level.between else None


def _steepest(slope_OI: Any, rank: int, above: Sequence[Tensor]) -> Tensor:
    """The first right singular vectors of a gradient, (rank, I), orthogonal to the rows above."""
    return torch.linalg.svd(_off(slope_OI, above))[2][:rank]


def _anywhere(rank: int, width: int, above: Sequence[Tensor]) -> Tensor:
    """Random rows, (rank, I), orthonormal, and orthogonal to the rows above."""
    return torch.linalg.qr(_off(torch.randn(rank, width), above).mT)[0].mT


def _off(rows_RI: Tensor, above: Sequence[Tensor]) -> Tensor:
    """What is left of rows without the span of the rows above."""
    if not above:
        return rows_RI
    _, sizes, directions_RI = torch.linalg.svd(torch.cat(list(above)).detach(), full_matrices=False)
    kept_RI = directions_RI[sizes > 1e-4 * sizes[0]]
    return rows_RI - rows_RI @ kept_RI.mT @ kept_RI


def _groups(groups: int, count: int, slopes: Sequence[Tensor] | None) -> list[int]:
    """The group of each layer.

    The first groups are the larger ones, as in a pyramid; or, by gradients, the cuts for which the
    unit gradients have the least variance in their groups.
    """
    if groups == 0:
        return list(range(count))
    if slopes is None:
        size, larger = divmod(count, groups)
        return [group for group in range(groups) for _ in range(size + (group < larger))]
    units = [slope / slope.norm() for slope in slopes]

    def alike(cuts: tuple[int, ...]) -> float:
        ends = zip((0, *cuts), (*cuts, count), strict=True)
        parts = [torch.stack(units[start:end]) for start, end in ends]
        return sum(float(its.sum(0).square().sum()) / len(its) for its in parts)

    cuts = max(combinations(range(1, count), groups - 1), key=alike)
    return [sum(place >= cut for cut in cuts) for place in range(count)]


def cosines(site: Site) -> Tensor:
    """The squared cosines between the rows of different levels' A in a layer, as a vector."""
    unit = [nn.functional.normalize(a, dim=1) for a in site.a]
    found = [(one @ two.mT).square().flatten() for one, two in combinations(unit, 2)]
    return torch.cat(found) if found else unit[0].new_zeros(0)


def apart(sites: Sequence[Site]) -> Tensor:
    """What `Way.penalty` weighs."""
    return torch.stack([cosines(site).sum() for site in sites]).mean()
