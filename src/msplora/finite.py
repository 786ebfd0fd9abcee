"""Whether all numbers of a tensor are numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither a NaN nor an infinity."""
    if not tensor.is_floating_point():
        return True
    # Of 8-bit floats torch only converts.
    readable = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return bool(torch.isfinite(readable).all())
