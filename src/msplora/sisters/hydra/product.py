"""The maths of Hydra: two branches, and the one weight and bias that they merge into.

    z = W0 x + b0
    y = z + s (B_p (A_p x + a_p) + b_p) + s (B_s (A_s z + a_s) + b_s)      (arXiv 2309.06922)

There is no nonlinearity between, so

    W = W0 + s (B_p A_p + B_s A_s W0)
    b = b0 + s (B_s A_s b0  +  B_p a_p + b_p  +  B_s a_s + b_s)

and the weight's part is a LoRA of rank r_p + r_s whose A depends on the base: A = [A_p; A_s W0],
B = [B_p, B_s], scaling s. The lower-case vectors are the factors' biases, which may be absent.

Shapes: N any leading dimensions, I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Branch:
    """One low-rank branch: A and its bias, B and its bias. The sequential one has I = O."""

    a_RI: Tensor
    b_OR: Tensor
    a_R: Tensor | None = None
    b_O: Tensor | None = None

    def __call__(self, x_NI: Tensor, dropout: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """``B (A x + a) + b``; what goes between A and B may be dropped."""
        between_NR = F.linear(x_NI, self.a_RI, self.a_R)
        return F.linear(dropout(between_NR) if dropout else between_NR, self.b_OR, self.b_O)

    @property
    def constant_O(self) -> Tensor | None:
        """What the branch gives where its input is zero; None without biases."""
        if self.a_R is None or self.b_O is None:
            return None
        return self.b_OR @ self.a_R + self.b_O


def lora_a(parallel: Branch, projected_RI: Tensor) -> Tensor:
    """The A of the merged LoRA, from ``A_s W0``."""
    return torch.cat([parallel.a_RI, projected_RI.to(parallel.a_RI)])


def lora_b(parallel: Branch, sequential: Branch) -> Tensor:
    """The B of the merged LoRA, without the scale."""
    return torch.cat([parallel.b_OR, sequential.b_OR], dim=1)


def bias_delta(
    parallel: Branch, sequential: Branch, scale: float, base_O: Tensor | None
) -> Tensor | None:
    """What merging adds to the bias; None where it adds nothing."""
    parts = [parallel.constant_O, sequential.constant_O]
    if base_O is not None:
        between_R = sequential.a_RI @ base_O.to(sequential.a_RI)
        parts.append(sequential.b_OR @ between_R)
    found = [part for part in parts if part is not None]
    return scale * torch.stack(found).sum(0) if found else None
