"""A linear layer and the pairs it borrows, as one node of autograd.

    y = W0 x + b + B (s * A d(x))        A = [A_1; A_2; ...],  B = [B_1, B_2, ...],  d = dropout

As separate operations the product costs a tensor of the output's size forward and one of the
input's size backward, each written, read back and added; and autograd keeps the assembled factors
and, under a half-precision base or with dropout, a converted copy of the input. Here the frozen
layer's product and the pairs' become one tensor, in place, and backward keeps the input itself
(which layers that share it keep once), s A d(x), and the dropout's mask; of these, what it needs.

The scales multiply A d(x), a few numbers per token, and not B, as everywhere else (`product.py`):
in small batches the copy of B would be a good part of the cost. For a scale that is a power of two,
as by default, this is the same to the last bit.

Shapes as in `product.py`: N any leading dimensions, I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .narrow import both_products, narrow_product, product_of_few_rows

_unsafe_view = torch.ops.aten._unsafe_view.default  # each look-up costs as much as the call


class Mix(NamedTuple):
    """How the pairs of a site enter its output."""

    ranks: tuple[int, ...]
    """r_t, one per level."""
    scales_R: Tensor
    """s_t, repeated r_t times; it multiplies A d(x)."""
    dropout: float
    """The probability that an input of A is set to zero; 0 outside training, below 1."""
    dtype: torch.dtype
    """What the low-rank product is computed in; at least as precise as the input."""

    @property
    def gain(self) -> float:
        """What makes up for the dropout: it multiplies sums, as factors would be rounded again."""
        return 1 / (1 - self.dropout)


def linear_with_pairs(
    x_NI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    a_factors: Sequence[Tensor],
    b_factors: Sequence[Tensor],
    mix: Mix,
) -> Tensor:
    """``W0 x + b + B (s * A d(x))``, (N, O), in the dtype of the input.

    Args:
        x_NI: the input, in the dtype of the weight.
        weight_OI: the layer's weight; it may be a transposed view.
        bias_O: the layer's bias.
        a_factors: A_t, (r_t, I), one per level.
        b_factors: B_t, (O, r_t), one per level.
        mix: scales, dropout and dtype.
    """
    if torch.is_grad_enabled():
        inputs: Any = (x_NI, weight_OI, bias_O, mix, *a_factors, *b_factors)
        return _LinearWithPairs.apply(*inputs)  # pyright: ignore[reportReturnType]
    return _forward(x_NI, weight_OI, bias_O, mix, a_factors, b_factors)[0]


def linear_with_stacks(
    x_NI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_RO: Tensor,
    dropout: float,
) -> Tensor:
    """The same for few tokens, out of stacks that are kept for backward (`stacking.py`).

    There it is the number of operations that costs, and not the size of what they make.

    Args:
        x_NI: the input, in the dtype of the weight.
        weight_OI: the layer's weight; it may be a transposed view.
        bias_O: the layer's bias.
        a_RI: A; its dtype, at least as precise as the input's, is that of the low-rank product.
        b_RO: B transposed, times the scales, in the same dtype.
        dropout: the probability that an input of A is set to zero; 0 in half precision, in which
            what makes up for it would be rounded.
    """
    if torch.is_grad_enabled():
        inputs: Any = (x_NI, weight_OI, bias_O, dropout, a_RI, b_RO)
        return _LinearWithStacks.apply(*inputs)  # pyright: ignore[reportReturnType]
    return _forward_of_stacks(x_NI, weight_OI, bias_O, dropout, a_RI, b_RO)[0]


def _forward(
    x_NI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    mix: Mix,
    a_factors: Sequence[Tensor],
    b_factors: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The output, s A d(x), and which inputs the dropout kept."""
    a_RI, b_OR = _stacked(mix, a_factors, b_factors)
    x_MI = x_NI.reshape(-1, x_NI.shape[-1])
    kept_MI = None
    inner_MI = x_MI if x_MI.dtype == mix.dtype else x_MI.to(mix.dtype)
    if mix.dropout:
        kept_MI = torch.empty_like(x_MI, dtype=torch.bool).bernoulli_(1 - mix.dropout)
        inner_MI = inner_MI * kept_MI
    h_MR = _scaled(narrow_product(inner_MI, a_RI), mix)
    del inner_MI
    y_MO = both_products(x_MI, weight_OI.t(), h_MR, b_OR.t(), bias_O=bias_O, gain=mix.gain)
    return _unfolded(y_MO, x_NI), h_MR, kept_MI


class _LinearWithPairs(torch.autograd.Function):
    """`linear_with_pairs`, keeping for backward nothing that is only converted or assembled."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        mix: Mix,
        *factors: Tensor,
    ) -> Tensor:
        levels = len(mix.ranks)
        y_NO, h_MR, kept_MI = _forward(
            x_NI, weight_OI, bias_O, mix, factors[:levels], factors[levels:]
        )
        ctx.mix, ctx.shape = mix, x_NI.shape
        wants_x, wants_weight, _, _, *wants = ctx.needs_input_grad
        wants_a, wants_b = any(wants[:levels]), any(wants[levels:])
        ctx.save_for_backward(
            *_needed(x_NI, weight_OI, h_MR, kept_MI, wants_x, wants_weight, wants_a, wants_b),
            *factors,
        )
        return y_NO

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return _without_autocast(_LinearWithPairs._gradients, ctx, grad_NO)

    @staticmethod
    def _gradients(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        mix: Mix = ctx.mix
        levels = len(mix.ranks)
        x_NI, weight_OI, h_MR, kept_MI, *factors = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _, *wants_factors = ctx.needs_input_grad
        a_RI, b_OR = _stacked(mix, factors[:levels], factors[levels:])
        grad_MO = grad_NO.reshape(-1, grad_NO.shape[-1])
        x_MI = _tokens(x_NI)

        grad_x = grad_weight = grad_bias = None
        grad_a: Sequence[Tensor | None] = [None] * levels
        grad_b: Sequence[Tensor | None] = [None] * levels
        inner_grad_MO = grad_MO if grad_MO.dtype == mix.dtype else grad_MO.to(mix.dtype)
        if any(wants_factors[levels:]):
            if torch.is_grad_enabled():  # for a second derivative h has to depend on x and A
                h_MR = _scaled(narrow_product(_kept(x_MI.to(mix.dtype), kept_MI), a_RI), mix)
            grad_RO = _gained(
                product_of_few_rows(h_MR.t(), inner_grad_MO).to(factors[0].dtype), mix
            )
            # Not contiguous, so that what accumulates gradients copies a part and keeps no other;
            # of rank 1 a part would be.
            parts = grad_RO.split(mix.ranks)
            grad_b = [part.t().clone() if len(part) == 1 else part.t() for part in parts]
        if wants_x or any(wants_factors[:levels]):
            grad_h_MR = _scaled(narrow_product(inner_grad_MO, b_OR.t()), mix)
            del inner_grad_MO
            if any(wants_factors[:levels]):
                inner_MI = _kept(x_MI.to(mix.dtype), kept_MI)
                grad_RI = _gained(
                    product_of_few_rows(grad_h_MR.t(), inner_MI).to(factors[0].dtype), mix
                )
                # Copies: a part that is a view would keep the others alive.
                grad_a = [part.clone() for part in grad_RI.split(mix.ranks)]
                del inner_MI
            if wants_x:
                grad_x = both_products(
                    grad_MO, weight_OI, grad_h_MR, a_RI, gain=mix.gain, mask_MO=kept_MI
                ).view(ctx.shape)
        if wants_weight:
            grad_weight = grad_MO.t() @ x_MI
        if wants_bias:
            grad_bias = grad_MO.sum(0)
        return grad_x, grad_weight, grad_bias, None, *grad_a, *grad_b


def _forward_of_stacks(
    x_NI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    dropout: float,
    a_RI: Tensor,
    b_RO: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The output, A d(x), and what dropout multiplies the input by."""
    x_MI = x_NI.reshape(-1, x_NI.shape[-1])
    inner_MI = x_MI if x_MI.dtype == a_RI.dtype else x_MI.to(a_RI.dtype)
    noise_MI = None
    if dropout:
        noise_MI = torch.empty_like(inner_MI).bernoulli_(1 - dropout).div_(1 - dropout)
        inner_MI = inner_MI * noise_MI
    h_MR = narrow_product(inner_MI, a_RI)
    del inner_MI
    y_MO = both_products(x_MI, weight_OI.t(), h_MR, b_RO, bias_O=bias_O)
    return _unfolded(y_MO, x_NI), h_MR, noise_MI


class _LinearWithStacks(torch.autograd.Function):
    """`linear_with_stacks`."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        dropout: float,
        a_RI: Tensor,
        b_RO: Tensor,
    ) -> Tensor:
        y_NO, h_MR, noise_MI = _forward_of_stacks(x_NI, weight_OI, bias_O, dropout, a_RI, b_RO)
        ctx.shape = x_NI.shape
        wants_x, wants_weight, _, _, wants_a, wants_b = ctx.needs_input_grad
        ctx.save_for_backward(
            *_needed(x_NI, weight_OI, h_MR, noise_MI, wants_x, wants_weight, wants_a, wants_b),
            a_RI,
            b_RO,
        )
        return y_NO

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return _without_autocast(_LinearWithStacks._gradients, ctx, grad_NO)

    @staticmethod
    def _gradients(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, h_MR, noise_MI, a_RI, b_RO = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _, wants_a, wants_b = ctx.needs_input_grad
        x_MI = _tokens(x_NI)
        inner_MI = x_MI
        grad_MO = inner_grad_MO = grad_NO.reshape(-1, grad_NO.shape[-1])
        if grad_MO.dtype != a_RI.dtype:
            inner_grad_MO = grad_MO.to(a_RI.dtype)
            if x_NI is not None:
                inner_MI = inner_MI.to(a_RI.dtype)
        if noise_MI is not None and x_NI is not None:
            inner_MI = inner_MI * noise_MI
        if wants_b and torch.is_grad_enabled():  # for a second derivative, h depends on x and A
            h_MR = narrow_product(inner_MI, a_RI)

        grad_x = grad_weight = grad_bias = grad_a = grad_b = None
        if wants_b:
            grad_b = product_of_few_rows(h_MR.t(), inner_grad_MO)
        if wants_x or wants_a:
            grad_h_MR = narrow_product(inner_grad_MO, b_RO)
            if wants_a:
                grad_a = product_of_few_rows(grad_h_MR.t(), inner_MI)
            if wants_x:
                grad_x = both_products(grad_MO, weight_OI, grad_h_MR, a_RI, mask_MO=noise_MI).view(
                    ctx.shape
                )
        if wants_weight:
            grad_weight = torch.mm(grad_MO.t(), x_MI)
        if wants_bias:
            grad_bias = grad_MO.sum(0)
        return grad_x, grad_weight, grad_bias, None, grad_a, grad_b


def _needed(
    x_NI: Tensor,
    weight_OI: Tensor,
    h_MR: Tensor,
    noise_MI: Tensor | None,
    wants_x: bool,
    wants_weight: bool,
    wants_a: bool,
    wants_b: bool,
) -> tuple[Tensor | None, ...]:
    """What backward reads of these; `x` for B's sake only for a second derivative.

    Below adapters that are frozen something else may train, and keeps no inputs of theirs.
    """
    return (
        x_NI if wants_weight or wants_a or wants_b else None,
        weight_OI if wants_x else None,
        h_MR if wants_b else None,
        noise_MI if wants_x or wants_a or wants_b else None,
    )


def _tokens(x_NI: Any) -> Any:
    """The input as rows of tokens, (M, I), where backward keeps it."""
    return None if x_NI is None else x_NI.reshape(-1, x_NI.shape[-1])


def _unfolded(y_MO: Tensor, x_NI: Tensor) -> Tensor:
    """A layer's output with the leading dimensions of its input: (N, O).

    Not by `view`: to a view that comes out of a node of autograd a model may not write in place.
    """
    return _unsafe_view(y_MO, (*x_NI.shape[:-1], y_MO.shape[-1]))


def _without_autocast(gradients: Callable[..., Any], ctx: Any, grad_NO: Tensor) -> Any:
    """Forward has chosen the dtypes; autocast around backward alone must not change some."""
    device_type = grad_NO.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return gradients(ctx, grad_NO)
    with torch.autocast(device_type, enabled=False):
        return gradients(ctx, grad_NO)


def _stacked(
    mix: Mix, a_factors: Sequence[Tensor], b_factors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    a_RI, b_OR = torch.cat(tuple(a_factors)), torch.cat(tuple(b_factors), dim=1)
    if a_RI.dtype == mix.dtype:
        return a_RI, b_OR
    return a_RI.to(mix.dtype), b_OR.to(mix.dtype)


def _scaled(h_MR: Tensor, mix: Mix) -> Tensor:
    """``A d(x)`` times the scales, or the gradient of that product."""
    scaled = h_MR * mix.scales_R
    return scaled if scaled.dtype == h_MR.dtype else scaled.to(h_MR.dtype)


def _gained(grad: Tensor, mix: Mix) -> Tensor:
    return grad * mix.gain if mix.dropout else grad


def _kept(x_MI: Tensor, kept_MI: Tensor | None) -> Tensor:
    return x_MI if kept_MI is None else x_MI * kept_MI
