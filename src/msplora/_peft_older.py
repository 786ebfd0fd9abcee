"""Saving, loading and deleting under PEFT before 0.21, which tells tensors by their names alone.

There, saving an adapter takes every tensor whose name contains the method's prefix, those of the
other adapters too, and no bias; loading takes a file without a single pair for a warning; deleting
stumbles over modules that are gone by the time it looks them up. So the three functions are
wrapped. For the adapters of other methods they do what they did.

PEFT 0.19 tells transformers' loader to take "base_model." off names in the model's decoder only,
and the store lies beside it, so that loader needs one more rule.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from packaging.version import Version
from peft.tuners import tuners_utils
from peft.utils import save_and_load
from torch import Tensor, nn

from ._peft import PREFIX, VERSION, OwnLayer
from .config import MSPLoraConfig
from .layer import PyramidLayer
from .model import MSPLoraModel
from .saving import tensors_to_save


def install() -> None:
    """Wrap the functions wherever they have been imported to."""
    for owner, name, wrap in (
        (save_and_load, "get_peft_model_state_dict", _saving),
        (save_and_load, "set_peft_model_state_dict", _loading),
        (tuners_utils, "delete_adapter", _deleting),
    ):
        original = getattr(owner, name)
        wrapped = wrap(original)
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is original:
                setattr(module, name, wrapped)
    if Version("0.19") <= VERSION < Version("0.20"):
        try:
            from peft.utils import transformers_weight_conversion as conversion
        except ImportError:  # it needs transformers 5
            return
        conversion.build_peft_weight_mapping = _renaming(
            conversion.build_peft_weight_mapping, conversion.WeightRenaming
        )


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def get_peft_model_state_dict(
        model: Any,
        state_dict: Mapping[str, Tensor] | None = None,
        adapter_name: str = "default",
        **options: Any,
    ) -> dict[str, Tensor]:
        inner = getattr(model, "_orig_mod", model)
        config = inner.peft_config[adapter_name]
        if not isinstance(config, MSPLoraConfig):
            return original(model, state_dict, adapter_name, **options)
        tensors = dict(inner.state_dict() if state_dict is None else state_dict)
        pairs = tensors_to_save(inner, adapter_name, tensors)
        others = {key: value for key, value in tensors.items() if PREFIX not in key}
        saved = original(model, others, adapter_name, **options)
        saved.update(_biases(inner, config, tensors))
        for key, value in pairs.items():
            saved[MSPLoraModel._remove_adapter_name_from_key(key, adapter_name)] = value
        return saved

    return get_peft_model_state_dict


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def set_peft_model_state_dict(
        model: Any,
        peft_model_state_dict: dict[str, Tensor],
        adapter_name: str = "default",
        **options: Any,
    ) -> Any:
        config = model.peft_config[adapter_name]
        if isinstance(config, MSPLoraConfig):
            remapped = MSPLoraModel._remap_adapter_state_dict_for_load(
                model, config, adapter_name, peft_model_state_dict
            )
            # PEFT puts the adapter's name in by itself.
            peft_model_state_dict = {
                MSPLoraModel._remove_adapter_name_from_key(key, adapter_name): value
                for key, value in remapped.items()
            }
        return original(model, peft_model_state_dict, adapter_name, **options)

    return set_peft_model_state_dict


def _deleting(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def delete_adapter(
        model: nn.Module, adapter_name: str, *args: Any, **options: Any
    ) -> list[str] | None:
        layers: list[Any] = [its for its in model.modules() if isinstance(its, OwnLayer)]
        if not layers:
            return original(model, adapter_name, *args, **options)
        active: Any = None  # the first layer speaks for all
        for layer in layers:
            layer.delete_adapter(adapter_name)
            active = active or layer.active_adapters[:]
        tuners_utils._delete_auxiliary_adapter(
            model, adapter_name=adapter_name, new_active_adapters=active
        )
        return active

    return delete_adapter


def _renaming(original: Callable[..., Any], rename: Any) -> Callable[..., Any]:
    @wraps(original)
    def build_peft_weight_mapping(
        weight_conversions: Any, adapter_name: str, peft_config: Any = None
    ) -> list[Any]:
        if isinstance(peft_config, MSPLoraConfig):
            # What else there is converts the experts of a LoRA.
            renamed = [its for its in weight_conversions or [] if isinstance(its, rename)]
            weight_conversions = [rename("base_model.model.", ""), *renamed]
        return original(weight_conversions, adapter_name, peft_config)

    return build_peft_weight_mapping


def _biases(
    model: nn.Module, config: MSPLoraConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The biases that train with an adapter, by the names that they have in the model."""
    if config.bias == "none":
        return {}
    if config.bias == "all":
        return {key: its for key, its in tensors.items() if f".{key}".endswith(".bias")}
    names = [
        f"{path}.base_layer.bias"
        for path, module in model.named_modules()
        if isinstance(module, PyramidLayer)
    ]
    return {name: tensors[name] for name in names if name in tensors}
