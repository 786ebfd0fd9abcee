"""Follow the bytes that tensors would hold, while real code runs on tensors without storage.

The trace sees every operation below autograd. What an operation makes is counted when it is made,
and no longer when the last thing that holds it lets go: a variable, what autograd saved, the cache
of autocast. So what the peak is made of is found by running the code, and not by a formula.

Numbers that decide what runs (is there padding, how many tokens does the loss count?) have to be
known nevertheless. Whole numbers and truth values start in the batch, which is real and small, so
they are computed for real beside (`known`).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from msplora.errors import UnsupportedError

KNOWN_NUMBERS = 2**20
"""Tensors with more whole numbers than this are not computed for real."""

_aten = torch.ops.aten


class Held(str, Enum):
    """What a tensor is held for."""

    FROZEN = "frozen weights"
    TRAINED = "weights that train"
    GRADIENTS = "gradients"
    BUCKETS = "gradients of all (DDP)"
    OPTIMISER = "optimiser"
    ACTIVATIONS = "activations"
    LOGITS = "logits and loss"
    TEMPORARY = "temporary"


@dataclass(frozen=True)
class Peak:
    """The most bytes that were held at once, what for, and what the step was doing."""

    total: int = 0
    where: str = ""
    parts: dict[Held, int] = field(default_factory=dict)


class MemoryTrace(TorchDispatchMode):
    """Counts bytes while it is entered, above a `FakeTensorMode` that is entered before it.

    Args:
        fake: makes the tensors without storage.
        logits: the widths that only logits have, whole or in parts.
        rounding: the allocator's unit, in bytes.
        workspace: bytes that a kernel takes while it runs, from the operation and its arguments.
    """

    def __init__(
        self,
        fake: FakeTensorMode,
        logits: Collection[int] = (),
        rounding: int = 1,
        workspace: Callable[[Any, tuple[Any, ...]], int] = lambda func, args: 0,
    ) -> None:
        super().__init__()
        self.fake = fake
        self.peak = Peak()
        self.stepping = False
        """The optimiser is at work."""
        self._logits = frozenset(logits)
        self._rounding = rounding
        self._workspace = workspace
        self._parts: Counter[Held] = Counter()
        self._total = 0
        self._storages: dict[int, tuple[int, Held, weakref.ref[Any]]] = {}
        self._known = WeakIdKeyDictionary()

    def hold(self, tensor: Tensor, what: Held) -> None:
        """Count a tensor, or say anew what one that is counted is for."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        found = self._storages.get(key)
        if found:
            size, before, reference = found
            self._parts[before] -= size
        else:
            size = -(-storage.nbytes() // self._rounding) * self._rounding
            reference = weakref.ref(storage, lambda _: self._let_go(key))
            self._total += size
        self._parts[what] += size
        self._storages[key] = (size, what, reference)

    def start_anew(self) -> Peak:
        """The peak so far; the next one begins with what is held now."""
        found, self.peak = self.peak, Peak()
        self._note_peak()
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        flat, spec = tree_flatten((args, kwargs))
        tensors = [its for its in flat if isinstance(its, Tensor)]
        if func is _aten._local_scalar_dense.default:
            return self._number(tensors[0])
        for its in tensors:
            if not isinstance(its, FakeTensor):  # a batch, or a number in the code
                self._see(its)
        real = self._computed(func, flat, spec, tensors)
        try:
            made = func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            made = self._of_known_shape(func, args, real, error)
        for its in tree_flatten(made)[0]:
            if isinstance(its, Tensor):
                self._see(its)
        self._remember(func, args, made, real)
        self._note_peak(self._workspace(func, args))
        return made

    # -- bytes ------------------------------------------------------------------------------------

    def _see(self, tensor: Tensor) -> None:
        if tensor.untyped_storage()._cdata not in self._storages:
            self.hold(tensor, self._purpose(tensor))

    def _purpose(self, tensor: Tensor) -> Held:
        if tensor.dim() > 1 and tensor.shape[-1] in self._logits:
            return Held.LOGITS
        return Held.TEMPORARY if self.stepping or _in_backward() else Held.ACTIVATIONS

    def _let_go(self, key: int) -> None:
        size, what, _ = self._storages.pop(key)
        self._total -= size
        self._parts[what] -= size

    def _note_peak(self, workspace: int = 0) -> None:
        total = self._total + workspace
        if total > self.peak.total:
            parts = {what: size for what, size in self._parts.items() if size}
            if workspace:
                parts[Held.TEMPORARY] = parts.get(Held.TEMPORARY, 0) + workspace
            self.peak = Peak(total, self._where(), parts)

    def _where(self) -> str:
        if self.stepping:
            return "optimiser"
        return "backward" if _in_backward() else "forward"

    # -- numbers that are known -------------------------------------------------------------------

    def _value(self, tensor: Tensor) -> Tensor | None:
        """The numbers in a tensor, where they are known."""
        return self._known.get(tensor) if isinstance(tensor, FakeTensor) else tensor

    def _number(self, tensor: Tensor) -> Any:
        """What `item()` gives: a loss, a norm, a score is 1 here; nothing else depends on it."""
        value = self._value(tensor)
        if value is not None:
            with unset_fake_temporarily():
                return value.item()
        if tensor.dtype == torch.bool:
            return True
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _computed(self, func: Any, flat: list[Any], spec: Any, tensors: list[Tensor]) -> Any:
        """What an operation on known whole numbers gives; `None` where it is not known."""
        if not all(map(_is_small_and_whole, tensors)):
            return None
        values = {id(its): self._value(its) for its in tensors}
        if any(its is None for its in values.values()):
            return None
        if not tensors and any(type(its) is int and its > KNOWN_NUMBERS for its in flat):
            return None  # a large mask is being made
        with unset_fake_temporarily():
            there = [values[id(its)] if isinstance(its, Tensor) else its for its in flat]
            args, kwargs = tree_unflatten(there, spec)
            return func(*args, **kwargs)

    def _of_known_shape(self, func: Any, args: tuple[Any, ...], real: Any, error: Exception) -> Any:
        """The result of an operation whose shape depends on numbers, out of what is known."""
        if real is not None:
            return self.fake.from_tensor(real)
        if func is _aten.index.Tensor:
            found: list[Tensor | None] = []
            for index in args[1]:
                if index is None or index.dtype != torch.bool:
                    found.append(index)
                    continue
                value = self._value(index)
                if value is None:
                    break
                with unset_fake_temporarily():
                    found += value.nonzero(as_tuple=True)
            else:
                return func(args[0], found)
        if func is _aten.masked_select.default and (value := self._value(args[1])) is not None:
            with unset_fake_temporarily():
                selected = int(value.expand(args[0].shape).sum())
            return args[0].new_empty(selected)
        raise UnsupportedError(
            f"the dry run cannot follow {func}: the shape of what it makes depends on numbers that "
            f"only the real weights give. Train with training.max_steps = 1 instead."
        ) from error

    def _remember(self, func: Any, args: tuple[Any, ...], made: Any, real: Any) -> None:
        if real is not None:
            for its, value in zip(tree_flatten(made)[0], tree_flatten(real)[0], strict=False):
                if isinstance(its, FakeTensor) and _is_small_and_whole(value):
                    self._known[its] = value
            return
        for argument, its in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(its, FakeTensor):
                self._known.pop(its, None)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _is_small_and_whole(value: Any) -> bool:
    whole = not (value.dtype.is_floating_point or value.dtype.is_complex)
    return whole and value.numel() <= KNOWN_NUMBERS
