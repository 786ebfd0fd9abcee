"""The pyramid as three separate LoRA branches per layer: what one writes without thinking of cost.

Each level has its own dropout, its own two products and its own addition, as in the code that was
published with the paper; but here the shared pairs really act on every layer. No PEFT.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Factors = dict[str, tuple[nn.Parameter, nn.Parameter]]


class Branches(nn.Module):
    """A frozen linear layer and its branches, whose factors other layers may hold as well."""

    def __init__(
        self,
        base: nn.Module,
        pairs: list[tuple[nn.Parameter, nn.Parameter]],
        alpha: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.base = base
        self.down = nn.ParameterList([a for a, _ in pairs])
        self.up = nn.ParameterList([b for _, b in pairs])
        self.scales = [alpha / len(a) for a, _ in pairs]
        self.dropouts = nn.ModuleList([nn.Dropout(dropout) for _ in pairs])

    def forward(self, x: Tensor) -> Tensor:
        """Base plus branches, one after the other."""
        result = self.base(x)
        dtype = result.dtype
        x = x.to(self.down[0].dtype)
        for a, b, scale, dropout in zip(
            self.down, self.up, self.scales, self.dropouts, strict=True
        ):
            result = result + F.linear(F.linear(dropout(x), a), b) * scale
        return result.to(dtype)


def add_branches(
    model: nn.Module,
    pattern: str,
    *,
    ranks: tuple[int, int, int] = (8, 4, 2),
    alpha: float = 16.0,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Factors:
    """Wrap every module whose path matches, and return the factors by the pyramid's addresses."""
    paths = [path for path, _ in model.named_modules() if re.fullmatch(pattern, path)]
    places = {path: _block_and_kind(path) for path in paths}
    blocks = sorted({block for block, _ in places.values()})
    factors: Factors = {}
    for path, (block, kind) in places.items():
        base: Any = model.get_submodule(path)
        depth = blocks.index(block)
        third = depth * min(3, len(blocks)) // len(blocks)
        pairs = []
        levels = zip(("global", "mid", "local"), (0, third, depth), ranks, strict=True)
        for level, group, rank in levels:
            address = f"{level}/{group}/{kind}"
            if address not in factors:
                a = torch.empty(rank, base.in_features, dtype=dtype, device=base.weight.device)
                b = torch.zeros(base.out_features, rank, dtype=dtype, device=base.weight.device)
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
                factors[address] = nn.Parameter(a), nn.Parameter(b)
            pairs.append(factors[address])
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Branches(base, pairs, alpha, dropout))
    return factors


def _block_and_kind(path: str) -> tuple[int, str]:
    """The number of a module's block, and its path within it."""
    found = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.+)", path)
    assert found is not None, path
    return int(found[1]), found[2]
