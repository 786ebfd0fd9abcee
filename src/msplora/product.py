"""The maths: stacking the pairs of all levels into the one LoRA that a site is.

    h = W0 x + sum_t s_t B_t A_t x  =  W0 x + B A x         (arXiv 2503.21838, section 3)

    A = [A_global; A_mid; A_local]                           A_RI, stacked along the rank
    B = [s_g B_global, s_m B_mid, s_l B_local]               B_OR, likewise

so every adapted layer is exactly one LoRA of rank R = sum_t r_t and scaling 1. The scale s_t goes
into B, in float32 at least and before any cast: merge, export and PEFT's forward then see the same
numbers. `fused.py` computes the same sum where speed counts, with the scales on A x.

Shapes: N any leading dimensions, I in, O out, R rank, E experts (or a convolution's groups).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stack_a(factors: Sequence[Tensor], blocks: int = 1) -> Tensor:
    """Stack the A of all levels along the rank: ``[(E r_t, I, ...)] -> (E R, I, ...)``.

    With E = 1 this is a plain concatenation. PEFT lays the rows of E experts out expert by expert,
    and a convolution's groups group by group: there each block's rows must stay together.
    """
    if len(factors) == 1:
        return factors[0]
    if blocks == 1:
        return torch.cat(list(factors), dim=0)
    rest = factors[0].shape[1:]
    by_block = [factor.reshape(blocks, -1, *rest) for factor in factors]
    return torch.cat(by_block, dim=1).flatten(0, 1)


def stack_b(factors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """Stack the scaled B of all levels along the rank: ``[(O, r_t, ...)] -> (O, R, ...)``.

    Experts need nothing special: PEFT lays their columns out rank by rank.
    """
    scaled = [scale_b(factor, scale) for factor, scale in zip(factors, scales, strict=True)]
    return scaled[0] if len(scaled) == 1 else torch.cat(scaled, dim=1)


def scale_b(factor: Tensor, scale: float) -> Tensor:
    """``s_t B_t``, rounded once to the dtype of B."""
    if factor.dtype in (torch.float16, torch.bfloat16):
        return (factor.float() * scale).to(factor.dtype)
    return factor * scale
