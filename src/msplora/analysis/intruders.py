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


def intruders(
    weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, count: int, threshold: float = THRESHOLD
) -> Intruders:
    """Compare the `count` leading singular vectors of ``W0 + B A`` with all of W0's.

    Both decompositions are dense, in float32 (in float64 where the weight is): of all figures only
    this one takes them.

    Raises:
        OverflowError: the adapted weight has numbers beyond that dtype.
    """
    dtype = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    weight_OI = weight_OI.to(dtype)
    before = torch.linalg.svd(weight_OI, full_matrices=False).U
    # Into the copy: no update is made beside it.
    adapted = torch.addmm(weight_OI, b_OR.to(dtype), a_RI.to(dtype))
    if not bool(adapted.isfinite().all()):
        raise OverflowError(f"the adapted weight does not fit {str(dtype).rpartition('.')[2]}")
    after = torch.linalg.svd(adapted, full_matrices=False).U[:, :count]
    cosines = (before.mT @ after).abs().amax(0).clamp_max(1.0)
    return Intruders(tuple(cosines.tolist()), threshold)
