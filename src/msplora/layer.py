"""A PEFT LoRA layer whose factors are borrowed from the store and assembled when used.

PEFT builds its own layer for whatever it wraps (a linear layer, a quantised one, a convolution, an
expert's parameter …). `make_pyramid_layer` then changes the layer's class to a subclass that owns
no factor: `lora_A[adapter]` and `lora_B[adapter]` become views that stack the pairs of all levels
(`product.py`), and everything PEFT does with a rank-R LoRA of scaling 1 works on them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers.pytorch_utils import Conv1D

from . import _peft
from .borrowed import SitePairs, View
from .errors import UnsupportedError
from .factor import PLAIN
from .fused import Mix, linear_with_pairs, linear_with_stacks
from .pyramid import Pair
from .stacking import FEW_TOKENS
from .store import Store

# What PEFT's layers register of their own; here only the dropout stays registered.
_FACTOR_CONTAINERS = (
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)

_LINEAR = (nn.Linear, Conv1D)
_HALF = (torch.float16, torch.bfloat16)
_CAST = {torch.float32, *_HALF}
_SELECTIVE_CHECKPOINTING = {"_CachingTorchDispatchMode", "_CachedTorchDispatchMode"}


class PyramidLayer(_peft.OwnLayer):
    """Mixed in before a PEFT LoRA layer class by `make_pyramid_layer`."""

    adapter_layer_names = ("borrowed", "lora_magnitude_vector")
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
        site_pairs = SitePairs(
            [(pair, *store.pair(pair.address, adapter_name)) for pair in pairs],
            templates=self.conv_templates,
            transposed=transposed,
            base_layer=layer.get_base_layer(),
            site_key=site_key,
            adapter_name=adapter_name,
        )
        if layer.is_plain_linear and not transposed and not config.use_dora:
            site_pairs.join(store.stacks, pairs)
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
        layer.__dict__.pop("adapter_layer_names", None)  # where it adds the magnitudes once more
        self.store.add_magnitude(site_key, adapter_name, layer.lora_magnitude_vector[adapter_name])

    def cast_magnitude(self, adapter_name: str) -> None:
        """Give DoRA's magnitude the dtype that PEFT gives it without `autocast_adapter_dtype`."""
        layer: Any = self
        if adapter_name in layer.lora_magnitude_vector:
            dtype = _peft.new_adapter_dtype(layer.get_base_layer())
            layer.lora_magnitude_vector[adapter_name].to(dtype)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(
            "a plain LoRA adapter cannot be added to a layer that has an MSPLoRA adapter: PEFT "
            "would keep both in one layer. Add another MSPLoRA adapter, or merge or unload first."
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # No name for the input: an attention calls it query, and may be given it by that name.
        fused = self._fused(args[0]) if len(args) == 1 and not kwargs else None
        if fused is None:
            return super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return fused

    def _fused(self, x: Tensor) -> Tensor | None:
        """The output in one node with the base, `None` where PEFT's own forward has to run.

        Past `nn.Module.__getattr__` where it can be: in small batches such a look-up tells.
        """
        layer: Any = self
        borrowed = self._to_fuse()
        if borrowed is None:
            return None
        modules = layer._modules
        base = modules["base_layer"]
        plain = _plain_weights(base)
        if plain is None:
            return None
        weight, bias = plain
        its_dropout = modules["lora_dropout"]._modules[borrowed.adapter_name]
        parts = borrowed._modules
        if _is_watched(its_dropout) or _is_watched(parts["a"]) or _is_watched(parts["b"]):
            return None
        dropout = _dropout(its_dropout)
        factor_dtype = borrowed.dtype
        dtypes = _dtypes(x, weight.dtype, factor_dtype, layer)
        if dtypes is None or dropout is None:
            return None
        of_layer, of_product = dtypes
        if not x.dtype == weight.dtype == of_layer:
            x, weight = x.to(of_layer), weight.to(of_layer)
            bias = None if bias is None else bias.to(of_layer)
        weight_OI = weight.t() if type(base) is Conv1D else weight
        scaling = layer.scaling[borrowed.adapter_name]
        if x.is_nested or not isinstance(scaling, (int, float)):
            return None
        if scaling == 1 and _few_tokens(x) and not (dropout and of_product in _HALF):
            a_RI, b_RO = borrowed.stacked_on(x.device, of_product)
            return linear_with_stacks(x, weight_OI, bias, a_RI, b_RO, dropout)
        a_factors, b_factors = borrowed.factors_on(x.device)
        scales_R = borrowed.scales_R(factor_dtype, x.device, scaling)
        mix = Mix(borrowed.ranks, scales_R, dropout, of_product)
        return linear_with_pairs(x, weight_OI, bias, a_factors, b_factors, mix)

    def _to_fuse(self) -> SitePairs | None:
        """The one adapter without variant that is active, if it is what the layer has to compute.

        `torch.func` and forward-mode differentiation transform a function operation by operation,
        so there PEFT's forward runs; also where every module is watched, where single operations
        are recorded, and where B trains and no A does: then PEFT's keeps no input for backward.
        """
        layer: Any = self
        if layer.disable_adapters or layer.merged_adapters:
            return None
        borrowed: Any = None
        for name in layer.active_adapters:
            if name in self.borrowed:
                if borrowed is not None:
                    return None
                borrowed = self.borrowed[name]
        if borrowed is None or not borrowed.fusable:
            return None
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        if transformed or _has_any_global_hook() or _is_recorded():
            return None
        return None if borrowed.trains_b_alone() else borrowed

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
        layer: Any = self
        layer.lora_variant.pop(adapter_name, None)  # which PEFT before 0.21 keeps
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
        return _empty_layer, (type(self).__bases__[1],), self.__dict__


def _few_tokens(x: Tensor) -> bool:
    """Whether the layer uses stacks that outlive it. It must not depend on the call under way:
    checkpointing, which runs a layer twice, has to find it keeping the same."""
    if torch.compiler.is_compiling():  # which sees through the layer's own stacking
        return False
    return x.numel() < FEW_TOKENS * x.shape[-1]


def _plain_weights(base_layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """The weight and bias of a layer that does nothing but multiply: no hook, no other forward."""
    if _is_watched(base_layer) or type(base_layer) not in _LINEAR:
        return None
    parameters = base_layer._parameters
    if "weight" in parameters and "bias" in parameters:
        weight, bias = parameters["weight"], parameters["bias"]
    else:  # FSDP puts views in the parameters' places
        weight, bias = base_layer.weight, base_layer.bias
    # A quantised or distributed weight is a tensor of another type.
    return (weight, bias) if type(weight) in PLAIN else None  # pyright: ignore


def _is_recorded() -> bool:
    """Whether somebody keeps or repeats single operations: `torch.jit.trace`, or selective
    checkpointing, to which a product that is added in place has changed what was kept."""
    if torch.compiler.is_compiling():
        return False
    if torch.jit.is_tracing():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    modes = _get_current_dispatch_mode_stack()
    return any(type(its).__name__ in _SELECTIVE_CHECKPOINTING for its in modes)


def _is_watched(module: Any) -> bool:
    """Whether calling a module does more than its class says."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def _dropout(module: nn.Module) -> float | None:
    """The probability by which it drops at the moment; `None` where it does something else."""
    if type(module) is nn.Identity:
        return 0.0
    if type(module) is not nn.Dropout or module.p >= 1:
        return None
    return module.p if module.training else 0.0


def _dtypes(
    x: Tensor, weight: torch.dtype, factor: torch.dtype, layer: Any
) -> tuple[torch.dtype, torch.dtype] | None:
    """What PEFT computes the layer and the low-rank product in; `None` where it has to run."""
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        cast = {x.dtype, weight, factor} <= _CAST
        return (dtype, dtype) if cast else None
    if x.dtype != weight:
        return None
    if x.dtype == factor:
        return x.dtype, factor
    may_cast = getattr(layer, "cast_input_dtype_enabled", True)
    return (x.dtype, factor) if x.dtype in _HALF and factor == torch.float32 and may_cast else None


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
        "lora_A": View(nn.ModuleDict() if is_embedding else borrowed, "a", as_tensor=False),
        "lora_B": View(nn.ModuleDict() if is_embedding else borrowed, "b", as_tensor=False),
        "lora_embedding_A": View(borrowed if is_embedding else nn.ModuleDict(), "a", True),
        "lora_embedding_B": View(borrowed if is_embedding else nn.ModuleDict(), "b", True),
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
