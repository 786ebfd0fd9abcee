"""Watching how large the tensors become that a piece of code makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NothingAsLargeAs(TorchDispatchMode):
    """Fails as soon as an operation gives a tensor of so many numbers."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for its in tree_leaves(result):
            if isinstance(its, Tensor):
                assert its.numel() < self.numbers, f"{func} made {tuple(its.shape)}"
                self.largest = max(self.largest, its.numel())
        return result
