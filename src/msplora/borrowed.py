"""What one site borrows from the store, for one adapter: its pairs, and what is stacked of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _peft
from .factor import Factor
from .product import stack_a, stack_b
from .pyramid import Pair
from .stacking import Stacking, Stacks


class Assembled(nn.Module):
    """One factor of one site as PEFT's code expects it: with a `weight`, and callable on an input.

    Never registered in the model: it holds the store's `Factor`s so that `parameters()` and
    `requires_grad_()` reach them.
    """

    base_layer: nn.Module
    template: Any

    def __init__(
        self,
        factors: list[Factor],
        stack: Callable[[list[Tensor]], Tensor],
        template: nn.Module | None,
        transposed: bool,
        base_layer: nn.Module,
    ) -> None:
        super().__init__()
        self.factors = nn.ModuleList(factors)
        self.stack = stack
        self.transposed = transposed
        self.bias = None
        # Not registered: the base layer and the convolution whose stride and padding are used.
        unregistered: dict[str, Any] = {"base_layer": base_layer, "template": template}
        self.__dict__.update(unregistered)

    def assemble(self, device: torch.device) -> Tensor:
        """The stacked factor, (R, in …) or (out, R …), on `device`."""
        return self.stacked([factor().to(device) for factor in self.factors])

    def stacked(self, factors: list[Tensor]) -> Tensor:
        """Stack given tensors as this site stacks its factors."""
        stacked = self.stack(factors)
        return stacked.t() if self.transposed else stacked

    @property
    def weight(self) -> Tensor:
        own = self._first.device
        if own.type == "meta":  # low_cpu_mem_usage: the numbers come later
            return self.assemble(own)
        return self.assemble(_peft.device_of(self.base_layer) or own)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.assemble(x.device)
        if self.template is not None:
            return self.template._conv_forward(x, weight, None)
        return F.linear(x, weight)

    @property
    def _first(self) -> Tensor:
        first: Any = self.factors[0]
        return first.factor


class SitePairs(nn.Module):
    """What one site borrows for one adapter: A and B assembled over all levels."""

    def __init__(
        self,
        pairs: list[tuple[Pair, Factor, Factor]],
        *,
        templates: tuple[nn.Module | None, nn.Module | None],
        transposed: bool,
        base_layer: nn.Module,
        site_key: str,
        adapter_name: str,
    ) -> None:
        super().__init__()
        shape = pairs[0][0].shape
        down = _StackA(shape.blocks)
        up = _StackB([pair.scale for pair, _, _ in pairs])
        a_factors = [a for _, a, _ in pairs]
        b_factors = [b for _, _, b in pairs]
        if transposed:
            # A head tied to an embedding applies the transposed delta: A := (s B)^T, B := A^T.
            self.a = Assembled(b_factors, up, None, True, base_layer)
            self.b = Assembled(a_factors, down, None, True, base_layer)
        else:
            self.a = Assembled(a_factors, down, templates[0], False, base_layer)
            self.b = Assembled(b_factors, up, templates[1], False, base_layer)
        self.ranks = tuple(pair.rank for pair, _, _ in pairs)
        self.scales = tuple(pair.scale for pair, _, _ in pairs)
        self.owners = tuple(a_factors), tuple(b_factors)
        self.rank = sum(self.ranks)
        self.site_key = site_key
        self.adapter_name = adapter_name
        self.joined: tuple[Stacks, tuple[Stacking, Stacking], tuple[int, int]] | None = None
        self.alone: tuple[Stacking, ...] | None = None
        """How it stacks outside a call of the model."""
        first = pairs[0][1].factor
        self.kept_scales: tuple[float, Tensor] | None = None
        # Now, as the first call may be a compiled one.
        self.scales_R(first.dtype, first.device, 1.0)
        # A shared pair lives where its first borrower is.
        self.leads = [
            place for place, (pair, _, _) in enumerate(pairs) if pair.sites[0] == site_key
        ]

    @property
    def fusable(self) -> bool:
        """Whether the layer may compute them in one node with its base (`fused.py`)."""
        return self.joined is not None

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return self.owners[0][0].stored().dtype

    def trains_b_alone(self) -> bool:
        """Whether gradients are wanted of a B and of no A (LoRA-FA)."""
        if not torch.is_grad_enabled():
            return False
        owners_a, owners_b = self.owners
        if any(owner.stored().requires_grad for owner in owners_a):
            return False
        return any(owner.stored().requires_grad for owner in owners_b)

    def factors_on(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """The A and the B of all levels."""
        owners_a, owners_b = self.owners
        a_factors = [owner.value() for owner in owners_a]
        b_factors = [owner.value() for owner in owners_b]
        if any(factor.device != device for factor in a_factors):
            a_factors = [factor.to(device) for factor in a_factors]
            b_factors = [factor.to(device) for factor in b_factors]
        return a_factors, b_factors

    def join(self, stacks: Stacks, pairs: Sequence[Pair]) -> None:
        """Be computed in one node with the base, and stack together with other layers."""
        name, shape, ranks = self.adapter_name, pairs[0].shape, self.ranks
        ones = (1.0,) * len(ranks)
        owners_a, owners_b = self.owners
        # In depth order, kind by kind: the groups of a level follow on each other.
        order = (pairs[0].kind, *(pair.group for pair in pairs))
        of_a = stacks.stacking(name, shape.in_features, ranks, ones, transposed=False)
        of_b = stacks.stacking(name, shape.out_features, ranks, self.scales, transposed=True)
        places = of_a.join(order, owners_a), of_b.join(order, owners_b)
        self.joined = stacks, (of_a, of_b), places

    def stacked_on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (R, I) and B times the scales (R, O), over all levels."""
        assert self.joined is not None
        stacks, stackings, (place_a, place_b) = self.joined
        found = stacks.of(stackings, device, dtype)
        if found is not None:
            return found[0][place_a], found[1][place_b]
        if self.alone is None:
            alone = tuple(Stacking(its.ranks, its.scales, its.transposed) for its in stackings)
            for its, owners in zip(alone, self.owners, strict=True):
                its.join((), owners)
            self.alone = alone  # whole: another thread may be in its first call too
        factors = self.factors_on(device)
        a_RI, b_RO = (its(f, dtype)[0] for its, f in zip(self.alone, factors, strict=True))
        return a_RI, b_RO

    def scales_R(self, factor: torch.dtype, device: torch.device, scaling: float) -> Tensor:
        """Every level's scale times `scaling`, repeated as often as its rank.

        Kept from call to call: making it would copy from the host to the device.
        """
        dtype = factor if factor.itemsize > 4 else torch.float32
        if self.kept_scales is not None:
            kept_scaling, kept = self.kept_scales
            if kept_scaling == scaling and kept.device == device and kept.dtype == dtype:
                return kept
        by_level = [(rank, s * scaling) for rank, s in zip(self.ranks, self.scales, strict=True)]
        if torch.compiler.is_compiling():  # in the graph, without a copy from the host in each call
            parts = [torch.full((r,), s, dtype=dtype, device=device) for r, s in by_level]
            return torch.cat(parts)
        with torch.inference_mode(False):
            row = [scale for rank, scale in by_level for _ in range(rank)]
            made = torch.tensor(row, dtype=dtype, device=device)
        if type(made) is Tensor:  # not a stand-in of a tracer
            self.kept_scales = scaling, made
        return made

    def move_led_factors(self, device: torch.device) -> None:
        """Move the pairs whose first borrower this site is."""
        for assembled in (self.a, self.b):
            for place in self.leads:
                factor = assembled.factors[place]
                if factor.factor.device.type != "meta":
                    factor.to(device)


class _StackA:
    """`stack_a` with its block count; a class, so that layers can be pickled."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def __call__(self, factors: list[Tensor]) -> Tensor:
        return stack_a(factors, self.blocks)


class _StackB:
    """`stack_b` with its scales."""

    def __init__(self, scales: list[float]) -> None:
        self.scales = scales

    def __call__(self, factors: list[Tensor]) -> Tensor:
        return stack_b(factors, self.scales)


class View(Mapping):
    """Adapter -> the A or B of what a site borrows, as a layer or as a plain tensor."""

    def __init__(self, borrowed: nn.ModuleDict, part: str, as_tensor: bool) -> None:
        self.borrowed = borrowed
        self.part = part
        self.as_tensor = as_tensor

    def __getitem__(self, adapter_name: str) -> Any:
        assembled = getattr(self.borrowed[adapter_name], self.part)
        return assembled.weight if self.as_tensor else assembled

    def __getattr__(self, adapter_name: str) -> Any:
        """`layer.lora_A.default`, as with the `ModuleDict` that stands there in a LoRA."""
        borrowed = self.__dict__.get("borrowed")  # not there yet in a copy that is being made
        if borrowed is None or adapter_name not in borrowed:
            raise AttributeError(f"there is no adapter {adapter_name!r} in this layer")
        return self[adapter_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.borrowed)

    def __len__(self) -> int:
        return len(self.borrowed)

    def __contains__(self, adapter_name: Any) -> bool:
        return adapter_name in self.borrowed
