"""A PEFT LoRA layer whose A and B are computed from tensors with other names.

Each sister is, in every adapted layer, exactly one LoRA: Hydra's A is [A_p; A_s W0], ElaLoRA's is
diag(E) A. So PEFT builds its own LoRA layer for whatever it wraps (a linear layer, transformers'
Conv1D, a quantised one), and `change_class` then makes it a subclass that owns the sister's tensors
and answers PEFT's questions for `lora_A` and `lora_B` from them. Merging into any of these bases,
unmerging, converting to a plain LoRA and choosing adapters are PEFT's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from msplora import _peft
from msplora.errors import UnsupportedError

# What PEFT's layers register of their own, and what nothing here ever fills.
_UNUSED = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


class Factor:
    """A computed A or B, as PEFT's code expects it: with a `weight`, and callable on an input."""

    bias = None

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Computed(Mapping[str, Factor]):
    """Adapter -> its A or B, computed when it is asked for."""

    def __init__(self, names: Any, compute: Callable[[str], Tensor]) -> None:
        self.names = names
        self.compute = compute

    def __getitem__(self, adapter_name: str) -> Factor:
        if adapter_name not in self.names:
            raise KeyError(adapter_name)
        return Factor(self.compute(adapter_name))

    def __contains__(self, adapter_name: object) -> bool:
        # `Mapping` would ask `__getitem__`, which computes it: Hydra's A is a product with W0.
        return adapter_name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class SisterLayer(_peft.OwnLayer):
    """Mixed in before a PEFT LoRA layer class by `change_class`; each method has its own.

    What raises `NotImplementedError` here is what a method has to say of itself. It is not abstract
    in `abc`'s sense, whose metaclass PEFT's layers do not have.
    """

    containers: tuple[str, ...]
    """The attributes that hold its factors by adapter, each with the method's prefix.

    They are `ModuleDict`s of modules with a `weight`. TRL copies an adapter to its reference by
    names with more after the adapter's, and PEFT, which casts the parameters of a `ParameterDict`
    by putting others in their place, lets those train.
    """
    method: str
    made_of: tuple[type[SisterLayer], type]
    """The mixin and PEFT's class that a layer's class was made of."""

    def make_containers(self) -> None:
        """Register the empty `containers`, and what else a layer keeps by adapter."""
        layer: Any = self
        for name in self.containers:
            layer.add_module(name, nn.ModuleDict())

    def add(self, adapter_name: str, config: Any, key: str) -> None:
        """Make an adapter's tensors; `key` is the layer's path in the model."""
        raise NotImplementedError

    def a_RI(self, adapter_name: str) -> Tensor:
        """The A of the one LoRA that this layer is."""
        raise NotImplementedError

    def b_OR(self, adapter_name: str) -> Tensor:
        """The B of the one LoRA that this layer is; `scaling` is applied to it."""
        raise NotImplementedError

    @property
    def lora_A(self) -> Computed:
        return Computed(getattr(self, self.containers[0]), self.a_RI)

    @property
    def lora_B(self) -> Computed:
        return Computed(getattr(self, self.containers[0]), self.b_OR)

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        return self.containers

    def settle(self, adapter_name: str, rank: int, scaling: float, config: Any) -> None:
        """What every new adapter of a layer needs, once its tensors are made."""
        layer: Any = self
        layer.r[adapter_name] = rank
        layer.lora_alpha[adapter_name] = scaling * rank
        layer.scaling[adapter_name] = scaling
        layer.use_rslora[adapter_name] = False
        layer.use_dora[adapter_name] = False
        layer.lora_bias[adapter_name] = False
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        layer.lora_dropout[adapter_name] = dropout
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)

    def tensor_names(self, adapter_name: str) -> list[str]:
        """The names that an adapter's tensors have in this layer's state dict."""
        names = []
        for container in self.containers:
            held = getattr(self, container)
            if adapter_name in held:
                names += [
                    f"{container}.{adapter_name}.{name}" for name in held[adapter_name].state_dict()
                ]
        return names

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT goes by the base's weights, and those of an offloaded layer are on meta. Where it is
        # given a device, PEFT 0.18 fails.
        layer: Any = self
        base = layer.get_base_layer()
        device, dtype = device or _peft.device_of(base), _peft.new_adapter_dtype(base)
        for name in self.containers:
            held = getattr(layer, name)
            if adapter_name in held and not any(its.is_meta for its in held.parameters()):
                held[adapter_name] = held[adapter_name].to(device, dtype)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(
            f"a plain LoRA adapter cannot be added to a layer that has a {self.method} adapter: "
            f"PEFT would keep both in one layer. Add another {self.method} adapter, or merge or "
            f"unload first."
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickle could not find it by name.
        return _empty_layer, type(self).made_of, self.__dict__


def change_class(layer: LoraLayer, mixin: type[SisterLayer]) -> Any:
    """Make a layer that PEFT has just built, in place, one of a sister's; return it."""
    state: Any = layer
    for name in _UNUSED:
        state._modules.pop(name, None)
    for name in state.other_param_names:
        values = getattr(state, name)
        if hasattr(values, "clear"):
            values.clear()
    layer.__class__ = sister_class(mixin, type(layer))
    # PEFT's own: no sister adapts an embedding or has a magnitude.
    for name in _UNUSED[2:]:
        state.__dict__[name] = {}
    state.make_containers()
    return layer


@cache
def sister_class(mixin: type[SisterLayer], peft_class: type) -> type:
    """The subclass of a PEFT LoRA layer class that computes its factors.

    It keeps the name: PEFT tells some layers by the name of their class.
    """
    names = {
        "__module__": peft_class.__module__,
        "__doc__": mixin.__doc__,
        "made_of": (mixin, peft_class),
    }
    return type(peft_class.__name__, (mixin, peft_class), names)


def _empty_layer(mixin: type[SisterLayer], peft_class: type) -> Any:
    cls: Any = sister_class(mixin, peft_class)
    return cls.__new__(cls)
