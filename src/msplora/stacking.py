"""The factors of many layers, stacked by a few operations for a whole call of the model.

With few tokens, what a training step costs beyond the frozen model's is the number of operations
and not their size. A layer that stacks its own pairs needs two operations forward, four backward
and six nodes that accumulate a gradient. Here all A (or B) of one width are stacked at once, the
levels of a layer side by side:

    A_LRI = [[A_global; A_mid(l); A_local(l)] for every layer l],   B_LRO likewise, times the scales

The stacks live from the first layer that asks for them to the end of the call of the model, or of
a part of it that holds all adapted layers: losses that fold the logits call the decoder and not the
model. Outside such a call (a layer called by itself, or called again by checkpointing during
backward) a layer gets stacks of its own: nobody could tell when shared ones go stale, as an edit
through `.data` leaves no trace. Both are the same to what autograd keeps, as checkpointing asks.

Shapes as in `product.py`, and L the layers that are stacked together, D one of I and O.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import groupby, islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .factor import PLAIN, Factor

FEW_TOKENS = 512
"""Below this many, layers use stacks. From here on they stack in passing and keep nothing of it:
the operations cost little beside the products, and the stacks are more memory than LoRA takes."""


class Stacks:
    """What the layers of one model stack together while it is called."""

    def __init__(self) -> None:
        self.stackings: dict[tuple[Any, ...], Stacking] = {}
        self._call: _Call | None = None

    def stacking(
        self,
        adapter_name: str,
        width: int,
        ranks: tuple[int, ...],
        scales: tuple[float, ...],
        transposed: bool,
    ) -> Stacking:
        """Where the factors of this width, with these ranks and scales, are stacked together."""
        key = (adapter_name, width, ranks, scales, transposed)
        if key not in self.stackings:
            self.stackings[key] = Stacking(ranks, scales, transposed)
        return self.stackings[key]

    def forget(self, adapter_name: str) -> None:
        self.stackings = {key: its for key, its in self.stackings.items() if key[0] != adapter_name}

    def watch(self, model: nn.Module, layers: Iterable[str]) -> None:
        """Learn of the calls of `model`, and of every part of it that holds all of `layers`."""
        for module in _around(model, layers):
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end, always_call=True)

    def unwatch(self, model: nn.Module) -> None:
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if getattr(hook, "__self__", None) is self:
                        del hooks[key]
                        module._forward_hooks_always_called.pop(key, None)

    def of(
        self, stackings: Sequence[Stacking], device: torch.device, dtype: torch.dtype
    ) -> list[list[Tensor]] | None:
        """For each stacking the stacks (R, D) of its layers; `None` if layers stack their own."""
        call = self._call
        if call is None or call.thread != threading.get_ident():
            return None
        # Reentrant checkpointing runs a part of the model without gradients.
        made = call.made[device, dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
        found = []
        for stacking in stackings:
            if stacking not in made:
                factors = stacking.tensors_on(device)
                made[stacking] = None if factors is None else stacking(factors, dtype)
            stacks = made[stacking]
            if stacks is None:
                return None
            found.append(stacks)
        return found

    def abandon(self) -> None:
        """Forget the call under way: hooks do not hear of one that a Ctrl-C has ended."""
        self._call = None

    def _begin(self, module: nn.Module, args: Any) -> None:
        # A compiler sees through the layers' own stacking; replicas are called all at once.
        if not torch.compiler.is_compiling() and not getattr(module, "_is_replica", False):
            # Within the call of a larger part, too: no adapted layer is outside of this one.
            self._call = _Call()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._call = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_call": None}


def _around(model: nn.Module, layers: Iterable[str]) -> list[nn.Module]:
    """The model and the modules in it, from the outside in, that each hold all of `layers`."""
    parents = [path.split(".")[:-1] for path in layers]
    found = [model]
    for names in zip(*parents, strict=False):
        if len(set(names)) > 1:
            break
        part = found[-1].get_submodule(names[0])
        if isinstance(part, (nn.ModuleList, nn.ModuleDict)):
            break  # of blocks: one may run many times in a call, and in backward again
        found.append(part)
    return found


class _Call:
    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.made: defaultdict[Any, dict[Stacking, list[Tensor] | None]] = defaultdict(dict)


class Stacking:
    """The layers whose A, or whose B, are stacked together.

    Args:
        ranks: r_t, one per level.
        scales: what the factors are multiplied by, one per level.
        transposed: the factors are B, (O, r_t), else A, (r_t, I).
    """

    def __init__(self, ranks: tuple[int, ...], scales: tuple[float, ...], transposed: bool) -> None:
        self.ranks = ranks
        self.scales = scales
        self.transposed = transposed
        self._members: list[tuple[tuple[Any, ...], Sequence[Factor]]] = []
        self._layout: Layout | None = None

    def join(self, order: tuple[Any, ...], factors: Sequence[Factor]) -> int:
        """Add a layer.

        Args:
            order: sorts the layers such that those that share a factor follow on each other.
            factors: one per level.

        Returns:
            Its place in what a call returns.
        """
        self._members.append((order, factors))
        self._layout = None
        return len(self._members) - 1

    def tensors_on(self, device: torch.device) -> list[Tensor] | None:
        """Every factor once; `None` if one is elsewhere, hooked or sharded: layers see to that."""
        found = []
        for factor in self._laid_out().factors:
            its = factor.unhooked()
            if its is None or its.device != device or type(its) not in PLAIN:
                return None
            found.append(its)
        return found

    def __call__(self, factors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """One (R, D) per layer, in `dtype`, out of the tensors that `tensors_on` gives."""
        layout = self._laid_out()
        if torch.is_grad_enabled():
            inputs: Any = (layout, dtype, *factors)
            stacked = cast(tuple[Tensor, ...], _Stacked.apply(*inputs))
        else:
            stacked = layout.stack(factors, dtype)
        return [stacked[row] for row in layout.row_of]

    def _laid_out(self) -> Layout:
        if self._layout is None:
            self._layout = Layout(self._members, self.ranks, self.scales, self.transposed)
        return self._layout


class Share(NamedTuple):
    """One level of a layout."""

    rows: slice
    """Its rows of every stack."""
    scale: float
    borrowers: tuple[int, ...]
    """How many layers borrow its first factor, how many after them its second, and so on."""


class Layout:
    """How the factors are stacked, and the gradients brought back."""

    def __init__(
        self,
        members: Sequence[tuple[tuple[Any, ...], Sequence[Factor]]],
        ranks: tuple[int, ...],
        scales: tuple[float, ...],
        transposed: bool,
    ) -> None:
        self.rank = sum(ranks)
        self.transposed = transposed
        order = sorted(range(len(members)), key=lambda place: members[place][0])
        self.row_of = sorted(range(len(order)), key=order.__getitem__)
        """For every place, where its layer is in the layout."""
        self.factors: list[Factor] = []
        """Each once, level by level."""
        self.shares: list[Share] = []
        columns: list[list[int]] = []
        start = 0
        for level, (rank, scale) in enumerate(zip(ranks, scales, strict=True)):
            column: list[int] = []
            of_level: list[Factor] = []
            for place in order:
                factor = members[place][1][level]
                if not of_level or of_level[-1] is not factor:
                    of_level.append(factor)
                column.append(len(self.factors) + len(of_level) - 1)
            borrowers = tuple(len(list(its)) for _, its in groupby(column))
            self.shares.append(Share(slice(start, start + rank), scale, borrowers))
            self.factors += of_level
            columns.append(column)
            start += rank
        self._sequence = [number for of_layer in zip(*columns, strict=True) for number in of_layer]

    def stack(self, factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        parts = [its.t() for its in factors] if self.transposed else factors
        stacked_LRD = torch.cat([parts[number] for number in self._sequence])
        stacked_LRD = stacked_LRD.view(-1, self.rank, stacked_LRD.shape[1])
        for share in self.shares:
            if share.scale != 1:
                stacked_LRD[:, share.rows].mul_(share.scale)
        return stacked_LRD.to(dtype).unbind()

    def gradients(
        self, by_layer: Sequence[Tensor | None], dtype: torch.dtype, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of the factors, in `dtype`, out of those of the stacks.

        A factor whose layers did not run has none, as without the stacks.
        """
        ran = [its is not None for its in by_layer]
        if not any(ran):
            return [None] * len(self.factors)
        if not all(ran):
            zeros = torch.zeros_like(cast(Any, by_layer[ran.index(True)]))
            by_layer = [zeros if its is None else its for its in by_layer]
        grad_LRD = torch.stack(cast(Any, by_layer)).to(dtype)
        found: list[Tensor | None] = []
        for share in self.shares:
            layers = iter(ran)
            ran_any = [any(list(islice(layers, count))) for count in share.borrowers]
            wants = [its and wanted[len(found) + n] for n, its in enumerate(ran_any)]
            if not any(wants):
                found += [None] * len(wants)
                continue
            grad = _summed(grad_LRD[:, share.rows], share.borrowers)
            if share.scale != 1:
                grad = grad * share.scale
            grad = (grad.transpose(1, 2) if self.transposed else grad).contiguous()
            found += [its if kept else None for its, kept in zip(grad, wants, strict=True)]
        return found


def _summed(grad_LrD: Tensor, borrowers: tuple[int, ...]) -> Tensor:
    """The sum over the layers of each factor, (factors, r, D)."""
    each = borrowers[0]
    if each == 1 and len(borrowers) == len(grad_LrD):
        return grad_LrD
    if all(count == each for count in borrowers):
        return grad_LrD.unflatten(0, (-1, each)).sum(1)
    return torch.stack([its.sum(0) for its in grad_LrD.split(borrowers)])


class _Stacked(torch.autograd.Function):
    """`Layout.stack`; it keeps no tensor."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, layout: Layout, dtype: torch.dtype, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        # Autograd casts to each factor's own dtype, so this is the most precise among them.
        ctx.layout, ctx.dtype = layout, reduce(torch.promote_types, {its.dtype for its in factors})
        ctx.set_materialize_grads(False)
        return layout.stack(factors, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        wanted = ctx.needs_input_grad[2:]
        return None, None, *ctx.layout.gradients(grads, ctx.dtype, wanted)
