"""The updates of an adapted model as matrices, and back: the one place that knows PEFT's layouts.

An update is a list of *blocks*, each a product of two matrices: one for most layers, one for each
expert of a parameter, one for each group of a convolution.

Shapes: I in, O out, R rank, E experts or groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _peft
from .config import MSPLoraConfig
from .pyramid import Pair, Plan
from .spectrum import site_factors

Blocks = list[tuple[Tensor, Tensor]]
"""a (R, I) and b (O, R) of each block; the update is b a."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def updates_of(model: Any, *, variants: bool = False) -> Iterator[tuple[str, Blocks]]:
    """Every adapted site's update, by its key.

    With `variants` also of DoRA and its like, where it is what goes into their formula.
    """
    root = model.get_base_model()
    name = next(iter(model.peft_config))
    is_lora = not isinstance(model.peft_config[name], MSPLoraConfig)
    for key, a, b in site_factors(model, name, variants=variants):
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        if a.ndim == 3:  # experts
            yield key, list(zip(a.unbind(), b.unbind(), strict=True))
            continue
        module = module_of(root, key)
        groups = getattr(module, "groups", 1) if isinstance(module, _CONVOLUTIONS) else 1
        if is_lora and is_out_proj(root, key) and _peft.lora_counts_out_proj_twice():
            b = b * 2
        yield (
            key,
            [
                (a_R, b_O.chunk(groups, 1)[place])
                for place, (a_R, b_O) in enumerate(
                    zip(a.chunk(groups), b.chunk(groups), strict=True)
                )
            ],
        )


def module_of(root: nn.Module, key: str) -> nn.Module | None:
    """The base's own module of that path, under any adapter; `None` where it is a parameter's."""
    module: Any = root
    for name in key.split("."):
        module = getattr(_peft.unwrapped(module), name, None)
        if not isinstance(module, nn.Module):
            return None
    return _peft.unwrapped(module)


def is_out_proj(root: nn.Module, key: str) -> bool:
    """Whether a site is the output of an `nn.MultiheadAttention`, adapted with it."""
    parent, _, name = key.rpartition(".")
    return name == "out_proj" and isinstance(module_of(root, parent), nn.MultiheadAttention)


def laid_out(pair: Pair, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """A and B of a pair as PEFT lays them out, the level's scale taken out of B."""
    shape = pair.shape
    a = torch.cat([its for its, _ in blocks])
    if shape.layout == "experts":
        # A's rows expert by expert, B's columns rank by rank.
        b = torch.stack([its for _, its in blocks], 2).flatten(1)
    else:
        b = torch.cat([its for _, its in blocks])
    return a.reshape(shape.a(pair.rank)), (b / pair.scale).reshape(shape.b(pair.rank))


def sums_of(found: Plan, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Blocks]:
    """The sum of every site's pairs, as one pair of matrices for each block."""
    sums = {}
    for site in found.sites:
        own = [(pairs[pair.address], pair) for pair in found.pairs_of[site.key]]
        blocks = [_as_blocks(tensors, pair) for tensors, pair in own]
        sums[site.key] = [
            (torch.cat([a for a, _ in its]), torch.cat([b for _, b in its], 1))
            for its in zip(*blocks, strict=True)
        ]
    return sums


def _as_blocks(tensors: tuple[Tensor, Tensor], pair: Pair) -> Blocks:
    a, b = tensors[0], tensors[1] * pair.scale
    count = pair.shape.blocks
    if pair.shape.layout == "experts":
        b_blocks = b.unflatten(1, (-1, count)).unbind(2)
    else:
        b_blocks = b.flatten(1).chunk(count)
    return list(zip(a.flatten(1).chunk(count), b_blocks, strict=True))


def norm_of(blocks: Blocks) -> float:
    """The Frobenius norm of an update, by way of matrices of its rank's size."""
    return math.sqrt(sum(float((_core(b) @ _core(a.mT).mT).square().sum()) for a, b in blocks))


def _core(factor: Tensor) -> Tensor:
    return torch.linalg.qr(factor.double(), mode="r").R
