"""Around an injection: what it is refused for, what it starts from, and how it is undone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from . import _peft
from .config import MSPLoraConfig
from .errors import AdapterFileError, ConfigError, TargetError, UnsupportedError
from .layer import PyramidLayer
from .matching import STORE_NAME, model_type_of, own_modules
from .pyramid import Plan
from .store import Store, find_store


def check_name_is_free(model: nn.Module, adapter_name: str) -> None:
    """Refuse a second adapter under the name of one that the model has.

    PEFT only warns, and starts a LoRA anew in the layers that it finds again. Of pairs that layers
    share some would stay the old ones, where layers borrow them that the new config does not name.
    """
    store = find_store(model)
    if store is not None and adapter_name in store.plans:
        raise ConfigError(
            f"this {type(model).__name__} has an adapter {adapter_name!r} already. To make it "
            f"anew, call unload() of the adapted model, which gives its base back, or load the "
            f"base again. To have both adapters, give this one another name (adapter_name=…)."
        )


def check_request(
    model: nn.Module, adapter_name: str, config: Any, state_dict: Any
) -> tuple[str | None, str | None]:
    if not isinstance(config, MSPLoraConfig):
        raise UnsupportedError(
            f"a model with MSPLoRA adapters takes an MSPLoraConfig, not "
            f"{type(config).__name__}; PEFT cannot mix methods in one model."
        )
    if adapter_name in _peft.PREFIX:
        raise ConfigError(
            f"the adapter's name {adapter_name!r} is part of {_peft.PREFIX!r}, which marks its "
            f"tensors: PEFT would not find them again. Choose another name."
        )
    if "." in adapter_name:
        raise ConfigError(f"the adapter's name {adapter_name!r} contains a dot; leave it out.")
    if state_dict is not None:
        raise UnsupportedError(
            "MSPLoRA cannot be injected from a state dict alone: its tensors do not say which "
            "layers borrow them. Pass the adapter's config."
        )
    tensor_parallel = getattr(model, "tp_size", None) or getattr(model, "_tp_size", None)
    if tensor_parallel and tensor_parallel > 1:
        raise UnsupportedError(
            "MSPLoRA does not run on a tensor-parallel base (tp_plan): a shared pair would "
            "need two layouts at once. Use FSDP or DDP."
        )
    # Not inside PEFT's wrappers: trainable tokens are a layer there, and no method of their own.
    for key, module in own_modules(model):
        if isinstance(module, _peft.BaseTunerLayer) and not isinstance(module, PyramidLayer):
            raise UnsupportedError(
                f"{key!r} already carries a {type(module).__name__} adapter of another method; "
                f"merge or unload that one first."
            )
    return getattr(config, "_made_for", (None, None))


def new_store(model: nn.Module) -> Store:
    """A store that can be registered on `model`."""
    if hasattr(model, STORE_NAME):
        raise TargetError(
            f"this {type(model).__name__} has an attribute {STORE_NAME!r} of its own, where the "
            f"adapter's tensors would be kept. Rename it, or adapt a part of the model."
        )
    return Store()


def bare_config(config: MSPLoraConfig, target: nn.Module) -> MSPLoraConfig:
    """A config by which PEFT builds its layer with the least of factors: they are replaced."""
    from transformers.pytorch_utils import Conv1D

    bare = copy.copy(config)
    bare.r = bare.lora_alpha = 1
    if isinstance(target, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        bare.r = target.groups  # which must divide it
    bare.rank_pattern = {}
    bare.alpha_pattern = {}
    bare.use_rslora = bare.use_dora = False
    bare.init_lora_weights = False
    if isinstance(target, Conv1D):
        bare.fan_in_fan_out = True
    return bare


def base_of(model: nn.Module, key: str, plan: Plan) -> nn.Module:
    """The base layer of a site; for a parameter's site, the module that holds it."""
    site = plan.site_of[key]
    module: nn.Module = model
    for name in key.split("."):
        inner = getattr(_peft.unwrapped(module), name)
        if not isinstance(inner, nn.Module):
            break
        module = inner
    base = _peft.unwrapped(module)
    if site.shape.layout != "experts":
        return base
    # So that device and dtype are those of the parameter.
    holder = nn.Module()
    holder.weight = getattr(base, key.rpartition(".")[2])
    return holder


def check_type(model: nn.Module, config: MSPLoraConfig, model_type: str | None) -> None:
    found_type = model_type_of(model)
    if model_type is not None and found_type is not None and model_type != found_type:
        raise AdapterFileError(
            f"the adapter was made for a base of type {model_type!r}, and this one is "
            f"{found_type!r} ({type(model).__name__}). Load the base it was made for"
            f"{_named(config)}."
        )


def check_made_for(
    plan: Plan, model: nn.Module, config: MSPLoraConfig, fingerprint: str | None
) -> None:
    if fingerprint is not None and fingerprint != plan.fingerprint:
        raise AdapterFileError(
            f"the adapter was made for another base: the names and shapes of its sites have the "
            f"hash {fingerprint}, this model's {len(plan.sites)} sites have {plan.fingerprint}. "
            f"Load the base it was made for{_named(config)}."
        )
    path = getattr(getattr(model, "config", None), "_name_or_path", None)
    named = config.base_model_name_or_path
    if fingerprint and path and named and not _same_base(named, path):
        warnings.warn(
            f"the adapter names {config.base_model_name_or_path!r} as its base, and this model "
            f"comes from {path!r}: its sites fit, but make sure that the weights are the same.",
            stacklevel=3,
        )


def _same_base(one: str, other: str) -> bool:
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())


def _named(config: MSPLoraConfig) -> str:
    return f", {config.base_model_name_or_path!r}" if config.base_model_name_or_path else ""


def check_not_trained_whole(store: Store, config: MSPLoraConfig) -> None:
    for path, _ in store.named_modules(prefix=STORE_NAME):
        for name in config.modules_to_save or ():
            if path.endswith(name):
                raise ConfigError(
                    f"modules_to_save names {name!r}, which PEFT looks for at the end of a "
                    f"module's name and would find in the adapter's own {path!r}. Give the adapter "
                    f"another name, or name the module by a longer part of its path."
                )


def check_every_site_borrows(layers: Iterable[PyramidLayer], plan: Plan, adapter_name: str) -> None:
    borrowing = {
        layer.borrowed[adapter_name].site_key for layer in layers if adapter_name in layer.borrowed
    }
    missing = sorted({*plan.pairs_of, *dict(plan.tied)} - borrowing)
    if missing:
        raise TargetError(
            f"PEFT adapted {len(borrowing)} of the {len(plan.sites)} planned sites; without an "
            f"adapter stayed {missing[:5]}. Please report this, with the model and the config."
        )


def put_back(before: Mapping[str, nn.Module]) -> None:
    """Put the modules back that something replaced; `before` holds all there were, by path."""
    for path, module in before.items():
        parent_path, _, name = path.rpartition(".")
        parent = before.get(parent_path)
        if path and parent is not None and parent._modules.get(name) is not module:
            parent._modules[name] = module


def roll_back(
    model: nn.Module, before: Mapping[str, nn.Module], store: Store, adapter_name: str
) -> None:
    """Put the modules back that a failed injection replaced, and forget its pairs."""
    put_back(before)
    for module in before.values():
        if isinstance(module, PyramidLayer) and adapter_name in module.borrowed:
            module.delete_adapter(adapter_name)
    store.delete(adapter_name)
    if not store.plans and getattr(model, STORE_NAME, None) is store:
        store.stacks.unwatch(model)
        delattr(model, STORE_NAME)
