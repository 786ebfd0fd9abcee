"""The only file that knows PEFT's private names: registration, matching, version differences."""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import re
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from packaging.version import Version
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from peft.utils.peft_types import PeftType, register_peft_method

try:
    from peft.utils import NoMatchingPeftModuleError
except ImportError:  # before PEFT 0.21
    NoMatchingPeftModuleError = ValueError

__all__ = [
    "DEFAULT_TARGETS",
    "AuxiliaryTrainingWrapper",
    "BaseTunerLayer",
    "NoMatchingPeftModuleError",
    "check_adapters_to_merge",
    "get_pattern_key",
]

VERSION = Version(importlib.metadata.version("peft"))

NAME = "msplora"
GOES_BY_NAMES = not hasattr(BaseTuner, "_get_adapter_state_dict")
"""Whether this PEFT tells an adapter's tensors by their names alone; 0.21 asks the method."""

PREFIX = "msplora_"
"""Marks the adapter's tensors in state dicts; transformers derives it from the type's name."""


class OwnLayer:
    """Marks the layers of this package, which are mixed in before PEFT's."""


def register_type(name: str = NAME) -> Any:
    """Return the member of `PeftType` for a method's name, adding it on the first call.

    `register_peft_method` takes only members of the enum, which is closed; there is no official way
    for a method that lives outside PEFT. The member added here is a real one: look-up by name and
    by value, iteration, pickling and hashing work as for the others.
    """
    key = name.upper()
    existing = PeftType._member_map_.get(key)
    if existing is not None:
        return existing
    member = str.__new__(PeftType, key)
    member._name_ = key
    member._value_ = key
    member.__objclass__ = PeftType  # pyright: ignore[reportAttributeAccessIssue]
    member._sort_order_ = len(PeftType._member_names_)  # pyright: ignore[reportAttributeAccessIssue]
    PeftType._member_names_.append(key)
    PeftType._member_map_[key] = member
    PeftType._value2member_map_[key] = member
    type.__setattr__(PeftType, key, member)
    return member


def register(name: str, config_cls: type, model_cls: type) -> bool:
    """Tell PEFT the config and model classes of a method; a second call does nothing.

    Returns whether it was the first.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if register_type(name) in PEFT_TYPE_TO_TUNER_MAPPING:
        return False
    # transformers derives the prefix from the type's name.
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=f"{name}_")
    return True


def register_method() -> None:
    """Tell PEFT the config and model classes of `PeftType.MSPLORA`; a second call does nothing."""
    from .config import MSPLoraConfig
    from .model import MSPLoraModel

    if not register(NAME, MSPLoraConfig, MSPLoraModel):
        return
    _leave_the_store_out_of_the_base()
    if GOES_BY_NAMES:
        from . import _peft_older

        _peft_older.install()


def _leave_the_store_out_of_the_base() -> None:
    """Let `get_base_model_state_dict` and `set_base_model_state_dict` pass the store by.

    They tell the base's tensors from an adapter's by the layers and wrappers that hold them, and
    have no hook for an adapter's tensors that lie beside.
    """
    from peft.utils import save_and_load

    from .matching import STORE_NAME
    from .store import find_store

    name = "_get_adapter_state_dict_key_prefixes"
    original = getattr(save_and_load, name, None)
    if original is None:  # before PEFT 0.21
        return

    def prefixes(model: torch.nn.Module) -> set[str]:
        found = original(model)
        return found if find_store(model) is None else {*found, STORE_NAME}

    setattr(save_and_load, name, prefixes)


def dora_variant(layer: Any, config: Any) -> Any:
    """How PEFT computes DoRA on this kind of layer."""
    if "config" in inspect.signature(layer.resolve_lora_variant).parameters:
        return layer.resolve_lora_variant(config=config)
    return layer.resolve_lora_variant(use_dora=True, use_alora=False, arrow_config=None)


def as_loaded(
    model: Any, config: Any, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file by the names under which PEFT puts them into a model.

    Other releases of transformers name the weights of some models otherwise, or store several as
    one; PEFT translates them while it loads them. Tensors that are only renamed are handed on.

    Args:
        model: the base, or the adapted model.
        config: the adapter's.
        tensors: by their names in the file.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = getattr(base, "_checkpoint_conversion_mapping", None) or {}  # before transformers 5
    found = {renamed(name, names): its for name, its in tensors.items()}
    try:
        from peft.utils.transformers_weight_conversion import (
            convert_peft_adapter_state_dict_for_transformers as convert,
        )
    except ImportError:  # before transformers 5, or PEFT 0.19
        return found
    return convert(model=model, peft_config=config, adapter_state_dict=found)


def renamed(name: str, patterns: Mapping[str, str]) -> str:
    """A tensor's name after the first pattern that it meets, behind PEFT's prefix."""
    prefix = "base_model.model."
    for pattern, replacement in patterns.items():
        found, times = re.subn(pattern, replacement, name.removeprefix(prefix))
        if times:
            return prefix * name.startswith(prefix) + found
    return name


def is_target(config: Any, key: str) -> bool:
    """Whether PEFT would adapt the module called `key`."""
    found = check_target_module_exists(config, key)
    return bool(found) and not isinstance(found, _ExcludedModule)


def is_excluded(config: Any, key: str) -> bool:
    """Whether `exclude_modules` would leave out a module called `key`, were it named in full."""
    named = copy.copy(config)
    named.target_modules, named.modules_to_save = {key}, None
    return not is_target(named, key)


def include_all_linear(config: Any, model: torch.nn.Module) -> None:
    """Turn `target_modules="all-linear"` into the set of names PEFT means by it, in place."""
    _maybe_include_all_linear_layers(config, model)


def in_out_features(module: torch.nn.Module) -> tuple[int | None, int | None]:
    """The features of any layer PEFT's LoRA knows, quantised ones included; else `None, None`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Unsupported layer type": the caller says it better
        try:
            return _get_in_out_features(module)
        except AttributeError:
            return None, None


def parameter_shape(module: torch.nn.Module, name: str) -> tuple[int, int, int]:
    """``(experts, out, in)`` of a parameter that LoRA adapts by itself (`target_parameters`)."""
    parameter = getattr(module, name)
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 hides the shape
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    experts, first, second = shape
    # PEFT 0.18 takes every three-dimensional parameter for (experts, in, out).
    in_first = Version("0.19") > VERSION or getattr(module, "is_transposed", False)
    return (experts, second, first) if in_first else (experts, first, second)


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The base layer under any PEFT layers."""
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        # Past a wrapper's own look-up, which before 0.21 fails if none of its adapters is active.
        its: Any = module
        wrapper = isinstance(module, AuxiliaryTrainingWrapper)
        module = its.original_module if wrapper else its.base_layer
    return module


def parameter_wrapper(module: torch.nn.Module, name: str) -> ParamWrapper | None:
    """The wrapper, however deeply nested, that adapts the parameter `name`; `None` if none does."""
    while isinstance(module, ParamWrapper):
        if module.parameter_name == name:
            return module
        module = module.base_layer
    return None


@cache
def lora_counts_out_proj_twice() -> bool:
    """Whether PEFT's LoRA adds the delta of an `nn.MultiheadAttention`'s out_proj twice.

    PEFT 0.21 does: merging the attention adds it, and then merges out_proj as well.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=1, lora_alpha=1, target_modules=["0"], init_lora_weights=False)
    # The first to ask may be within `torch.device("meta")`.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = torch.nn.Sequential(torch.nn.MultiheadAttention(2, 1))
        attention: Any = inject_adapter_in_model(config, model)[0]  # pyright: ignore
        out_proj = attention.base_layer.out_proj
        expected = out_proj.weight + out_proj.get_delta_weight("default")
        attention.merge()
        return not torch.allclose(out_proj.weight, expected)


def device_of(base_layer: torch.nn.Module) -> torch.device | None:
    """Where a base layer computes; `None` if that cannot be told (its weights are on meta)."""
    hook = getattr(base_layer, "_hf_hook", None)  # accelerate's, of offloaded layers
    execution_device = getattr(hook, "execution_device", None)
    if execution_device is not None:
        return torch.device(execution_device)
    weight = _any_weight(base_layer)
    return None if weight is None or weight.device.type == "meta" else weight.device


def new_adapter_dtype(base_layer: torch.nn.Module) -> torch.dtype:
    """The dtype PEFT gives new factors on this base layer, before `autocast_adapter_dtype`."""
    dtype = getattr(base_layer, "compute_dtype", None)  # bitsandbytes' 4-bit layers
    if not isinstance(dtype, torch.dtype):
        weight = _any_weight(base_layer)
        dtype = torch.float32 if weight is None else weight.dtype
    # Packed integers, and floats too small to compute with.
    return dtype if dtype.is_floating_point and dtype.itemsize >= 2 else torch.float32


def _any_weight(module: torch.nn.Module) -> torch.Tensor | None:
    for name in ("weight", "qweight", "W_q", "in_proj_weight"):
        weight = getattr(module, name, None)
        if isinstance(weight, torch.Tensor):
            return weight
    return next(module.parameters(), None)
