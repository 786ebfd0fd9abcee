"""Run a model's code on the CPU so that it makes the tensors that it would make on a CUDA GPU.

PyTorch chooses by the device: which kernel of attention runs, what dropout keeps, what autocast
computes in float32, what the optimiser does at once. The tensors of a dry run are on the CPU (a
build of torch without CUDA ends the process where autograd meets another device), so the choices
that matter for memory are made here as PyTorch makes them. TRL's own kernels are Triton's there,
and work in place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from .weightless import Instead

_HALF = (torch.float16, torch.bfloat16)

# https://docs.pytorch.org/docs/stable/amp.html: CUDA operations that autocast to float32 …
_IN_FLOAT32 = frozenset(
    [
        *(
            "__pow__",
            "__rdiv__",
            "__rpow__",
            "pow",
            "exp",
            "expm1",
            "log",
            "log10",
            "log1p",
            "log2",
        ),
        *("reciprocal", "rsqrt", "softplus", "layer_norm", "group_norm", "norm", "normalize"),
        *("cosine_similarity", "dist", "cross_entropy", "nll_loss", "kl_div", "mse_loss"),
        *("l1_loss", "smooth_l1_loss", "huber_loss", "cosine_embedding_loss"),
        *("binary_cross_entropy_with_logits",),
    ]
)
# … and those that read what they get and write float32.
_TO_FLOAT32 = frozenset(["softmax", "log_softmax", "cumsum", "cumprod", "prod", "sum"])


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Make the choices of CUDA while this is entered."""
    with ExitStack() as stack:
        stack.enter_context(_Choices())
        for module, name, instead in _triton_instead():
            stack.enter_context(mock.patch.object(module, name, instead))
        yield


def steps_at_once(optimizer: Any) -> None:
    """Let an optimiser of PyTorch step over all parameters at once, as on a GPU."""
    for group in optimizer.param_groups:
        if "foreach" in group and not group.get("fused"):
            group["foreach"] = True


class _Choices(Instead):
    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):
            name = getattr(func, "__name__", "")
            if name in _IN_FLOAT32:
                args = tuple(_float32(its) for its in args)
                kwargs = {key: _float32(its) for key, its in kwargs.items()}
            elif name in _TO_FLOAT32 and args and _is_half(args[0]) and not kwargs.get("dtype"):
                kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention where it can be, else the memory-efficient kernel, else plain operations."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(dtype)
    plain = query.shape[-1] != value.shape[-1] or query.dim() != 4
    if attn_mask is None and query.dtype in _HALF and query.shape[-1] <= 256 and not plain:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    if plain or (enable_gqa and query.shape[1] != key.shape[1]):
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    bias = None
    if attn_mask is not None:
        bias = attn_mask
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
        # A row of the mask is padded to a multiple of 16 bytes' worth of numbers.
        spare = -bias.shape[-1] % 8
        if spare:
            bias = F.pad(bias, (0, spare))[..., : bias.shape[-1]]
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    grad = torch.is_grad_enabled() and any(its.requires_grad for its in (query, key, value))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, grad, dropout_p, is_causal, scale=scale
    )[0]


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """One kernel that keeps a mask of truth values."""
    if not training or p == 0 or p == 1 or inplace:
        return F.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _HALF


def _float32(value: Any) -> Any:
    return value.float() if _is_half(value) else value


def _triton_instead() -> list[tuple[Any, str, Any]]:
    """What TRL does otherwise where Triton runs: its kernels fold the logits without a copy."""
    utils, kernels = map(sys.modules.get, ("trl.trainer.utils", "trl.kernels.chunked_logprob"))
    patches: list[tuple[Any, str, Any]] = []
    if hasattr(utils, "_use_triton"):
        patches.append((utils, "_use_triton", lambda device: True))
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        if hasattr(kernels, name):
            patches.append((kernels, name, lambda *_, **__: None))
    return patches
