"""Singular values of every layer's update, exactly, and never through a dense matrix.

    B = Q_B R_B,   Aᵀ = Q_A R_A   ⇒   B A = Q_B (R_B R_Aᵀ) Q_Aᵀ

Q_B and Q_A have orthonormal columns, so the singular values of B A, (O, I), are those of the core
R_B R_Aᵀ, which is at most (R, R). All of it is done in float64: a small value next to a large one
keeps its digits.

Shapes: I in, O out, R rank, E experts, … any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from .errors import MSPLoraError, UnsupportedError

NOTHING = 1e-6
"""A product is nothing where its norm is at most this share of ‖A‖ ‖B‖."""
_TINY = torch.finfo(torch.float64).tiny


def singular_values(model: nn.Module, adapter_name: str = "default") -> Mapping[str, Tensor]:
    """The singular values of what an adapter adds to each weight, largest first.

    The update is the one that acts, ``scaling · B A``; for a pyramid ``Σ_t s_t B_t A_t``. A
    convolution's weight counts as the matrix (O, I · kernel). Works site by site: besides the
    results only one site's factors are held.

    Args:
        model: with an MSPLoRA adapter or PEFT's plain LoRA; a `PeftModel`, or a model into which
            the adapter was injected.
        adapter_name: which adapter.

    Returns:
        Site key → float64 tensor (min(O, I, R),) on the CPU, and for the experts of one parameter
        (E, min(O, I, R)). All further singular values of the (O, I) matrix are zero.

    Raises:
        MSPLoraError: the model has no such adapter, or its factors have no numbers.
        UnsupportedError: the adapter's update is not the product of two factors (DoRA).
    """
    return {
        key: singular_values_of(a_RI, b_OR).cpu()
        for key, a_RI, b_OR in site_factors(model, adapter_name)
    }


def singular_values_of(a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """The singular values of ``B A``, largest first: ``(… R, I), (… O, R) -> (… min(O, I, R))``.

    Args:
        a_RI: A, of any floating-point dtype.
        b_OR: B, with the same leading dimensions.

    Returns:
        float64; the other min(O, I) - min(O, I, R) singular values of the product are zero.

    Raises:
        MSPLoraError: the two cannot be multiplied, or hold numbers that are not finite.
    """
    fit = a_RI.ndim == b_OR.ndim >= 2 and a_RI.shape[-2] == b_OR.shape[-1]
    if not fit or a_RI.shape[:-2] != b_OR.shape[:-2]:
        raise MSPLoraError(
            f"A {tuple(a_RI.shape)} and B {tuple(b_OR.shape)} have no product B A. A has to be "
            f"(…, rank, in) and B (…, out, rank)."
        )
    a_RI, b_OR = _precise(a_RI), _precise(b_OR)
    if not (torch.isfinite(a_RI).all() and torch.isfinite(b_OR).all()):
        raise MSPLoraError("the factors hold numbers that are not finite; was the training stable?")
    _, r_A = torch.linalg.qr(a_RI.mT, mode="r")
    _, r_B = torch.linalg.qr(b_OR, mode="r")
    return torch.linalg.svdvals(r_B @ r_A.mT)


def norm_of(a_RI: Tensor, b_OR: Tensor) -> float:
    """The Frobenius norm of ``B A``: ``(… R, I), (… O, R)``, over all leading dimensions.

    Infinite where float64 ends; factors near that end would else have no singular values.
    """
    a_RI, b_OR = _precise(a_RI), _precise(b_OR)
    sizes = [float(its.abs().max()) if its.numel() else 0 for its in (a_RI, b_OR)]
    if not all(sizes):
        return 0.0
    scaled = singular_values_of(a_RI / sizes[0], b_OR / sizes[1])
    return float(scaled.norm()) * sizes[0] * sizes[1]


def is_nothing(a_RI: Tensor, b_OR: Tensor) -> bool:
    """Whether ``B A`` is zero, or what rounding leaves of zero: ``(… R, I), (… O, R)``.

    A start at orthogonal factors has a product of zero only as far as float32 goes.
    """
    a_RI, b_OR = (
        its / its.abs().max().clamp_min(_TINY) for its in (_precise(a_RI), _precise(b_OR))
    )
    # tr(BᵀB AAᵀ) is the square of the product's norm, and far more exact than what is asked here.
    square = float(((b_OR.mT @ b_OR) * (a_RI @ a_RI.mT)).sum())
    return square <= NOTHING**2 * float(a_RI.square().sum()) * float(b_OR.square().sum())


def _precise(factor: Tensor) -> Tensor:
    """In float64; on the CPU where its device has none."""
    factor = factor.detach()
    return (factor.cpu() if factor.device.type == "mps" else factor).double()


def site_factors(
    model: Any, adapter_name: str, *, variants: bool = False
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield every adapted site's key, A and B as matrices, the scaling in B; one site at a time.

    Args:
        model: as `singular_values`.
        adapter_name: which adapter.
        variants: the factors of DoRA and its like too, of which B A is not the update.

    Raises:
        MSPLoraError: as `singular_values`.
    """
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = {
        path: module
        for path, module in root.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.scaling
    }
    if not layers:
        found = sorted(getattr(model, "peft_config", {}))
        raise MSPLoraError(
            f"this {type(model).__name__} has no LoRA or MSPLoRA adapter {adapter_name!r}: "
            + (f"its adapters are {found}." if found else "it has no adapter.")
        )
    for path, layer in layers.items():
        # Inside an adapted attention, or a wrapper of another parameter of the same module.
        key = ".".join(part for part in path.split(".") if part != "base_layer")
        if hasattr(layer, "parameter_name"):
            key = f"{key}.{layer.parameter_name}".lstrip(".")
        yield key, *_matrices(layer, adapter_name, key, variants)


@torch.no_grad()
def _matrices(layer: Any, adapter_name: str, key: str, variants: bool) -> tuple[Tensor, Tensor]:
    """A and B of one layer: (R, I), (O, R); of experts (E, R, I), (E, O, R)."""
    variant = type(layer).__name__ if hasattr(layer, "lora_E") else None  # AdaLoRA's layers
    if adapter_name in layer.lora_variant:
        variant = type(layer.lora_variant[adapter_name]).__name__
    if variant is not None and not variants:
        raise UnsupportedError(
            f"what adapter {adapter_name!r} does to {key!r} is not adding B A to its weight: PEFT "
            f"computes it by {variant}. There are singular values of plain LoRA's and MSPLoRA's "
            f"updates, without DoRA."
        )
    if adapter_name in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    else:
        a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if "meta" in (a.device.type, b.device.type):
        raise MSPLoraError(
            f"the factors of {key!r} are on the meta device, without numbers. Load the adapter's "
            f"weights first."
        )
    b = _precise(b) * layer.scaling[adapter_name]
    experts = getattr(layer, "num_experts", 1)
    groups = layer.get_base_layer().groups if a.ndim > 2 else 1
    return as_matrices(a, b, experts=experts, groups=groups)


def as_matrices(
    a: Tensor, b: Tensor, *, experts: int = 1, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """A and B as PEFT lays them out, as matrices with a product: (R, I), (O, R).

    Args:
        a: of a linear layer or an embedding (R, I), of a convolution (R, I / groups, *kernel), or
            of experts (E R, I).
        b: likewise.
        experts: more than 1 gives (E, R, I), (E, O, R).
        groups: of a convolution.
    """
    if experts > 1:
        # PEFT lays A's rows out expert by expert, and B's columns rank by rank.
        return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    if a.ndim > 2:
        # Each group of outputs reads its own rows of A.
        return a.flatten(1), torch.block_diag(*b.flatten(1).chunk(groups))
    return a, b
