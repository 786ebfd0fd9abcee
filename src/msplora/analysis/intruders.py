"""Intruder dimensions: singular vectors of the adapted weight that the base's has nothing like.

"LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv 2410.21228): the j-th left singular
vector y_j of W0 + ΔW intrudes where ``max_i |cos(y_j, x_i)| < ε`` over all left singular vectors
x_i of W0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .results import Intruders

THRESHOLD = 0.5
"""ε."""


def left_vectors(weight_OI: Tensor) -> Tensor:
    """All left singular vectors of a weight, (O, K), by a dense decomposition.

    It is in float32, or in float64 where the weight is: of all figures only intruders take one.
    """
    return torch.linalg.svd(weight_OI.to(_precision(weight_OI)), full_matrices=False).U


def intruders(
    weight_OI: Tensor,
    before_OK: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    count: int,
    threshold: float = THRESHOLD,
) -> Intruders:
    """Compare the `count` leading singular vectors of ``W0 + B A`` with all of W0's.

    Args:
        weight_OI: W0.
        before_OK: its `left_vectors`.
        a_RI: of the update.
        b_OR: of the update, scaled.
        count: how many.
        threshold: of the cosines.

    Raises:
        OverflowError: the adapted weight has numbers beyond the dtype of the decompositions.
    """
    dtype = _precision(weight_OI)
    adapted = torch.addmm(weight_OI.to(dtype), b_OR.to(dtype), a_RI.to(dtype))
    if not bool(adapted.isfinite().all()):
        raise OverflowError(f"the adapted weight does not fit {str(dtype).rpartition('.')[2]}")
    after = left_vectors(adapted)[:, :count]
    cosines = (before_OK.mT @ after).abs().amax(0).clamp_max(1.0)
    return Intruders(tuple(cosines.tolist()), threshold)


def _precision(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
