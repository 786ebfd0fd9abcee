"""The products of a narrow matrix and a wide one, of R rows and of thousands, as fast as hardware
makes them.

Libraries cut their products for square matrices. What is done about it here was measured on CPUs
(docs/decisions.md, "`A x` rank by rank, and in blocks"); on a GPU, and compiled, each is one plain
product. Shapes as in `fused.py`: M rows of tokens; N and K any.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCKED = 2**18
"""From this size of the wide matrix on, a CPU makes a narrow product in blocks of its columns."""

HALVED = 128
"""From this many tokens on, a product is added to bfloat16 in bfloat16 halves (`_in_bfloat16`):
below, cutting the factors takes more operations than the product is worth."""


def both_products(
    x_MI: Tensor,
    weight_IO: Tensor,
    left_MR: Tensor,
    right_RO: Tensor,
    *,
    bias_O: Tensor | None = None,
    gain: float = 1,
    mask_MO: Tensor | None = None,
) -> Tensor:
    """``x @ weight + bias + gain * mask * (left @ right)``, (M, O), in the dtype of `x`.

    On a CPU, in float32, the narrow product comes first and the wide one is added to it: that reads
    what is there while it multiplies, where the narrow one would read and write all of it once
    more. In half precision it comes last, as a sum that has been rounded is not as near
    (`test_fused.py`); on a GPU too, where a product with a bias is another kernel than one that is
    added, and B = 0 must leave the layer's own bits.
    `left` and `right` may be more precise than `x`; then only the sum is rounded.
    """
    exact = left_MR.dtype == x_MI.dtype and x_MI.dtype.itemsize >= 4
    if exact and x_MI.device.type == "cpu" and (bias_O is None or mask_MO is None):
        if bias_O is not None:
            sum_MO = torch.addmm(bias_O, left_MR, right_RO, alpha=gain)
        elif gain == 1:
            sum_MO = torch.mm(left_MR, right_RO)
        else:  # beta = 0: what is added is not read
            nothing = left_MR.new_zeros(())
            sum_MO = torch.addmm(nothing, left_MR, right_RO, beta=0, alpha=gain)
        if mask_MO is not None:
            sum_MO.mul_(mask_MO)
        return sum_MO.addmm_(x_MI, weight_IO)

    sum_MO = F.linear(x_MI, weight_IO.t(), bias_O)
    if mask_MO is None and _worth_halves(x_MI, left_MR):
        left_MR, right_RO = _in_bfloat16(left_MR, right_RO)
    if mask_MO is None and left_MR.dtype == sum_MO.dtype:
        return sum_MO.addmm_(left_MR, right_RO, alpha=gain)
    product_MO = left_MR @ right_RO
    return sum_MO.add_(product_MO if mask_MO is None else product_MO.mul_(mask_MO), alpha=gain)


def _worth_halves(out_MO: Tensor, left_MR: Tensor) -> bool:
    if out_MO.dtype == left_MR.dtype or out_MO.dtype != torch.bfloat16:
        return False
    return len(out_MO) >= HALVED and not torch.compiler.is_compiling()


def _in_bfloat16(left_MR: Tensor, right_RO: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices in bfloat16 whose product is that of the float32 ones, to 16 bits.

    Each is cut into a high and a low half: l r = l_h r_h + l_l r_h + l_h r_l, but for l_l r_l. At
    three times the rank this is still a small product, in the dtype that hardware multiplies fast,
    and it needs no float32 copy of what it is added to. Not for a compiler: inductor takes a number
    that was rounded and widened again for the number itself, and the low halves would be zero.
    """
    left_high, right_high = left_MR.bfloat16(), right_RO.bfloat16()
    left_low, right_low = (left_MR - left_high).bfloat16(), (right_RO - right_high).bfloat16()
    left = torch.cat((left_high, left_low, left_high), dim=1)
    return left, torch.cat((right_high, right_high, right_low))


def narrow_product(wide_MD: Tensor, factor_RD: Tensor) -> Tensor:
    """``wide @ factor.t()``, (M, R).

    In float32 it lies in memory rank by rank: at ranks as small and odd as 14 MKL takes about twice
    as long for one that lies token by token.
    """
    if wide_MD.dtype.itemsize < 4:
        return F.linear(wide_MD, factor_RD)
    return product_of_few_rows(factor_RD, wide_MD.t()).t()


def product_of_few_rows(left_RK: Tensor, right_KN: Tensor) -> Tensor:
    """``left @ right``, (R, N), for R much smaller than N.

    In float32 on a CPU in blocks of N: MKL, whose products are cut for square matrices, takes about
    twice as long for the whole. The blocks are as many as divide N, so that a batch of 8 rows of
    any length has them.
    """
    if not _takes_blocks(right_KN) or right_KN.numel() < BLOCKED:
        return torch.mm(left_RK, right_KN)
    blocks = math.gcd(right_KN.shape[1], 8)
    right_nKb = right_KN.unflatten(1, (blocks, -1)).transpose(0, 1)
    return torch.bmm(left_RK.expand(blocks, -1, -1), right_nKb).transpose(0, 1).flatten(1)


def _takes_blocks(wide_KN: Tensor) -> bool:
    on_cpu = wide_KN.device.type == "cpu" and not torch.compiler.is_compiling()
    columns = wide_KN.shape[1]
    return on_cpu and columns >= 128 and columns % 2 == 0 and wide_KN.dtype.itemsize >= 4
