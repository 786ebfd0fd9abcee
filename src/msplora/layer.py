"""A PEFT LoRA layer whose factors are borrowed from the store and assembled when used.

PEFT builds its own layer for whatever it wraps (a linear layer, a quantised one, a convolution, an
expert's parameter …). `make_pyramid_layer` then changes the layer's class to a subclass that owns
no factor: `lora_A[adapter]` and `lora_B[adapter]` become views that stack the pairs of all levels
(`product.py`), and everything PEFT does with a rank-R LoRA of scaling 1 works on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from . import _peft
from .errors import UnsupportedError
from .product import add_product, stack_a, stack_b
from .pyramid import Pair
from .store import Factor, Store

# What PEFT's layers register of their own; here only the dropout stays registered.
_FACTOR_CONTAINERS = (
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)


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
    def dtype(self) -> torch.dtype:
        return self._first.dtype

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
        self.rank = sum(pair.rank for pair, _, _ in pairs)
        self.site_key = site_key
        # A shared pair lives where its first borrower is.
        self.leads = [
            place for place, (pair, _, _) in enumerate(pairs) if pair.sites[0] == site_key
        ]

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


class _View(Mapping):
    """Adapter -> the A or B of what a site borrows, as a layer or as a plain tensor."""

    def __init__(self, borrowed: nn.ModuleDict, part: str, as_tensor: bool) -> None:
        self.borrowed = borrowed
        self.part = part
        self.as_tensor = as_tensor

    def __getitem__(self, adapter_name: str) -> Any:
        assembled = getattr(self.borrowed[adapter_name], self.part)
        return assembled.weight if self.as_tensor else assembled

    def __iter__(self) -> Iterator[str]:
        return iter(self.borrowed)

    def __len__(self) -> int:
        return len(self.borrowed)

    def __contains__(self, adapter_name: Any) -> bool:
        return adapter_name in self.borrowed


class PyramidLayer:
    """Mixed in before a PEFT LoRA layer class by `make_pyramid_layer`."""

    adapter_layer_names = ("borrowed",)
    borrowed: nn.ModuleDict
    store: Store
    conv_templates: tuple[nn.Module | None, nn.Module | None]
    merged_by_another = False
    """Another layer merges into this one's weight: the embedding that a head is tied to, or the
    attention around an out_proj. Merging here as well would add the delta twice."""

    def borrow(
        self,
        store: Store,
        adapter_name: str,
        pairs: tuple[Pair, ...],
        config: Any,
        site_key: str,
        transposed: bool = False,
    ) -> None:
        """Let this layer use an adapter's pairs.

        Args:
            store: their owner.
            adapter_name: whose pairs.
            pairs: one per level.
            config: the adapter's `MSPLoraConfig`.
            site_key: this site's key in the plan.
            transposed: the layer is a head tied to an embedding, whose pairs these are.
        """
        layer: Any = self
        self.__dict__["store"] = store
        self.merged_by_another = self.merged_by_another or transposed
        site_pairs = SitePairs(
            [(pair, *store.pair(pair.address, adapter_name)) for pair in pairs],
            templates=self.conv_templates,
            transposed=transposed,
            base_layer=layer.get_base_layer(),
            site_key=site_key,
        )
        self.borrowed[adapter_name] = site_pairs
        # One LoRA of rank R and scaling 1: the levels' scales are in B.
        layer.r[adapter_name] = layer.lora_alpha[adapter_name] = site_pairs.rank
        layer.scaling[adapter_name] = 1.0
        layer.use_rslora[adapter_name] = False
        layer.use_dora[adapter_name] = config.use_dora
        layer.lora_bias[adapter_name] = False
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        layer.lora_dropout[adapter_name] = dropout
        if config.use_dora:
            self._add_magnitude(adapter_name, config, site_key)
        layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)

    def _add_magnitude(self, adapter_name: str, config: Any, site_key: str) -> None:
        layer: Any = self
        variant = _peft.dora_variant(layer, config)
        layer.lora_variant[adapter_name] = variant
        variant.init(layer, adapter_name=adapter_name, config=config)
        self.store.add_magnitude(site_key, adapter_name, layer.lora_magnitude_vector[adapter_name])

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(
            "a plain LoRA adapter cannot be added to a layer that has an MSPLoRA adapter: PEFT "
            "would keep both in one layer. Add another MSPLoRA adapter, or merge or unload first."
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        adapter_name = None if kwargs else self._adapter_to_fuse(x)
        if adapter_name is None:
            return super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        borrowed: Any = self.borrowed[adapter_name]
        scaling = layer.scaling[adapter_name]
        result = layer.base_layer(x, *args)
        x = layer.lora_dropout[adapter_name](x)
        if result.dtype != x.dtype:  # a hook on the base layer casts its output
            return result + (borrowed.b(borrowed.a(x)) * scaling).to(result.dtype)
        a_RI, b_OR = borrowed.a.assemble(x.device), borrowed.b.assemble(x.device)
        return add_product(result, x, a_RI, b_OR, scaling)

    def _adapter_to_fuse(self, x: Tensor) -> str | None:
        """The adapter to add into the base's output, `None` where PEFT's own forward has to run.

        Fused where one adapter without variant acts on a plain linear layer and no dtype changes.
        """
        layer: Any = self
        if not layer.is_plain_linear or layer.disable_adapters or layer.merged:
            return None
        active = [name for name in layer.active_adapters if name in self.borrowed]
        if len(active) != 1 or active[0] in layer.lora_variant:
            return None
        borrowed: Any = self.borrowed[active[0]]
        if not x.dtype == borrowed.a.dtype == layer.get_base_layer().weight.dtype:
            return None
        return None if torch.is_autocast_enabled(x.device.type) else active[0]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        layer: Any = self
        if not self.merged_by_another:
            super().merge(safe_merge, adapter_names)  # pyright: ignore
            return
        names = _peft.check_adapters_to_merge(layer, adapter_names)
        layer.merged_adapters += [name for name in names if name in self.borrowed]

    def unmerge(self) -> None:
        layer: Any = self
        if self.merged_by_another:
            layer.merged_adapters.clear()
        else:
            super().unmerge()  # pyright: ignore

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)  # pyright: ignore
        self.store.delete(adapter_name)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # The device only: PEFT casts to the base's dtype here too, which on the road of
        # low_cpu_mem_usage would round a float32 adapter to a bfloat16 base.
        layer: Any = self
        device = device or _peft.device_of(layer.get_base_layer())
        if device is not None and device.type != "meta" and adapter_name in self.borrowed:
            self.borrowed[adapter_name].move_led_factors(device)  # pyright: ignore
            if adapter_name in layer.lora_magnitude_vector:
                layer.lora_magnitude_vector[adapter_name].to(device)

    def set_scale(self, adapter: str, scale: float) -> None:
        layer: Any = self
        if adapter in layer.scaling:
            layer.scaling[adapter] = float(scale)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickle could not find it by name.
        return _empty_layer, (type(self).__mro__[2],), self.__dict__


def make_pyramid_layer(layer: LoraLayer) -> None:
    """Change a freshly made PEFT LoRA layer, in place, into one that borrows its factors."""
    state: Any = layer
    templates = tuple(
        _conv_template(next(iter(getattr(state, name).values()), None))
        for name in ("lora_A", "lora_B")
    )
    is_embedding = len(state.lora_embedding_A) > 0
    for name in _FACTOR_CONTAINERS:
        state._modules.pop(name, None)
    # In the instance's dictionary, past `nn.Module`: found as attributes, but not registered.
    borrowed = nn.ModuleDict()
    unregistered = {
        "borrowed": borrowed,
        "store": None,
        "conv_templates": templates,
        "lora_magnitude_vector": nn.ModuleDict(),
        "lora_A": _View(nn.ModuleDict() if is_embedding else borrowed, "a", as_tensor=False),
        "lora_B": _View(nn.ModuleDict() if is_embedding else borrowed, "b", as_tensor=False),
        "lora_embedding_A": _View(borrowed if is_embedding else nn.ModuleDict(), "a", True),
        "lora_embedding_B": _View(borrowed if is_embedding else nn.ModuleDict(), "b", True),
    }
    state.__dict__.update(unregistered)
    for name in state.other_param_names:
        values = getattr(state, name)
        if hasattr(values, "clear"):
            values.clear()
    layer.__class__ = pyramid_class(type(layer))


@cache
def pyramid_class(peft_class: type) -> type:
    """The subclass of a PEFT LoRA layer class that borrows its factors.

    It keeps the name: PEFT tells some layers by the name of their class.
    """
    from peft.tuners.lora.layer import Linear

    return type(
        peft_class.__name__,
        (PyramidLayer, peft_class),
        {
            "__module__": peft_class.__module__,
            "__doc__": PyramidLayer.__doc__,
            "is_plain_linear": peft_class is Linear,
        },
    )


def _empty_layer(peft_class: type) -> Any:
    cls: Any = pyramid_class(peft_class)
    return cls.__new__(cls)


def _conv_template(module: nn.Module | None) -> nn.Module | None:
    """A convolution's stride, padding and so on, without its weight."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None
    module.weight = None  # pyright: ignore[reportAttributeAccessIssue]
    return module
