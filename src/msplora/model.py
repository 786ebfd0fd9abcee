"""`MSPLoraModel`: wires the plan, the store and the layers into PEFT's LoRA."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from . import _peft
from .config import MSPLoraConfig
from .errors import AdapterFileError, ConfigError, TargetError, UnsupportedError
from .layer import PyramidLayer, make_pyramid_layer
from .planning import STORE_NAME, make_plan, prepared
from .pyramid import Plan
from .store import Store, find_store, raise_for
from .weighted import combined_adapter


class MSPLoraModel(LoraModel):
    """The tuner behind `get_peft_model(model, MSPLoraConfig(...))`.

    Everything a LoRA does, it inherits; it differs in who owns the factors. Planning happens in
    `inject_adapter`, the one road that every way of adding an adapter takes.
    """

    prefix: str = _peft.PREFIX

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Plan, create the pairs, then let PEFT replace the layers; undo all of it on an error."""
        config: Any = self.peft_config[adapter_name]
        made_for = self._check_request(model, adapter_name, config, state_dict)
        self._check_new_adapter_config(config)
        spelled_out = prepared(model, config)
        plan = make_plan(model, spelled_out)
        _check_made_for(plan, model, config, made_for)
        config.target_modules = spelled_out.target_modules
        for note in plan.notes:
            if "outside every list" in note:
                warnings.warn(note, stacklevel=2)

        modules_before = dict(model.named_modules())
        store = find_store(model) or _new_store(model)
        try:
            self._create_pairs(model, store, plan, adapter_name, config, low_cpu_mem_usage)
            _check_not_trained_whole(store, config)
            self._plan = plan
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
            _check_every_site_borrows(model, plan, adapter_name)
        except BaseException:
            _roll_back(model, modules_before, store, adapter_name)
            raise
        finally:
            self.__dict__.pop("_plan", None)
        config.model_type = _model_type(model)
        config.fingerprint = plan.fingerprint

    def _check_request(
        self, model: nn.Module, adapter_name: str, config: Any, state_dict: Any
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
        for key, module in model.named_modules():
            if isinstance(module, _peft.BaseTunerLayer) and not isinstance(module, PyramidLayer):
                raise UnsupportedError(
                    f"{key!r} already carries a {type(module).__name__} adapter of another method; "
                    f"merge or unload that one first."
                )
        return getattr(config, "_made_for", (None, None))

    def _create_pairs(
        self,
        model: nn.Module,
        store: Store,
        plan: Plan,
        adapter_name: str,
        config: MSPLoraConfig,
        low_cpu_mem_usage: bool,
    ) -> None:
        where = {}
        for pair in plan.pairs:
            base = _base_of(model, pair.sites[0], plan)
            device = _peft.device_of(base) or torch.device("cpu")
            if low_cpu_mem_usage:
                device = torch.device("meta")
            where[pair.address] = (_peft.new_adapter_dtype(base), device)
        store.add(plan, adapter_name, init=config.init_lora_weights, dtype_and_device=where)

    def _create_and_replace(
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, PyramidLayer) else None
        if parameter_name is not None and isinstance(target, PyramidLayer):
            layer = _peft.parameter_wrapper(target, parameter_name)
        if layer is None:
            super()._create_and_replace(
                _bare(lora_config, target),
                adapter_name,
                target,
                target_name,
                parent,
                current_key,
                parameter_name=parameter_name,
            )
            layer = getattr(parent, target_name)
            for inner in list(layer.modules()):
                if isinstance(inner, LoraLayer) and not isinstance(inner, PyramidLayer):
                    make_pyramid_layer(inner)
            if isinstance(parent, nn.TransformerEncoderLayer):
                # In eval mode its fused kernel reads the weights past their layers, so an adapter
                # would not act; it stands back where a layer has a hook.
                layer.register_forward_pre_hook(_do_nothing)
        self._lend(layer, adapter_name, lora_config, current_key)

    def _lend(self, layer: Any, adapter_name: str, config: MSPLoraConfig, key: str) -> None:
        plan = self._plan
        store = find_store(self.model)
        embedding = dict(plan.tied).get(key)
        pairs = plan.pairs_of[embedding or key]
        layer.borrow(store, adapter_name, pairs, config, key, transposed=embedding is not None)
        base = layer.base_layer
        if isinstance(base, nn.MultiheadAttention):
            inner: Any = base.out_proj
            inner_key = f"{key}.out_proj"
            inner.merged_by_another = True
            inner.borrow(store, adapter_name, plan.pairs_of[inner_key], config, inner_key)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # pyright: ignore
        if key == STORE_NAME or key.startswith(f"{STORE_NAME}."):
            return False
        return super()._check_target_module_exists(peft_config, key)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # PEFT freezes what lies outside its layers; `set_adapter` has already said which pairs
        # train.
        store = find_store(model)
        trainable = {} if store is None else {p: p.requires_grad for p in store.parameters()}
        with self._bias_as_peft_spells_it():
            super()._mark_only_adapters_as_trainable(model)
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)

    @contextmanager
    def _bias_as_peft_spells_it(self) -> Iterator[None]:
        """Older PEFT releases know the biases of LoRA's layers as "lora_only"."""
        changed = [its for its in self.peft_config.values() if its.bias == "msplora_only"]
        for config in changed:
            config.bias = "lora_only"
        try:
            yield
        finally:
            for config in changed:
                config.bias = "msplora_only"

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        store = find_store(self.model)
        if store is not None and autocast_adapter_dtype:
            store.cast(adapter_name, {torch.float16, torch.bfloat16}, torch.float32)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        store = find_store(self.model)
        if store is not None:
            store.delete(adapter_name)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        if isinstance(getattr(unloaded, STORE_NAME, None), Store):
            delattr(unloaded, STORE_NAME)
        return unloaded

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        **kwargs: Any,
    ) -> None:
        """Combine adapters level by level into a new one.

        Args:
            adapters: names of adapters on the same sites, with the same levels and groups.
            weights: one factor each.
            adapter_name: the new adapter's name.
            combination_type: "cat" stacks the pairs of each level, so that the delta is exactly the
                weighted sum; "linear" adds the factors, as PEFT's "linear" does (same ranks).
            kwargs: PEFT's options for other combination types, which are refused.

        Raises:
            UnsupportedError: another combination type.
            ConfigError: adapters that cannot be combined.
        """
        if adapter_name in self.peft_config:
            return
        config, tensors = combined_adapter(
            self.model, self.peft_config, adapters, weights, combination_type, kwargs
        )
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            raise
        store = find_store(self.model)
        assert store is not None
        with torch.no_grad():
            for address, (a, b) in tensors.items():
                new_a, new_b = store.pair(address, adapter_name)
                new_a.factor.copy_(a)
                new_b.factor.copy_(b)

    # What PEFT saves and loads (these two hooks are new in PEFT 0.21; older releases go by names).

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        keys = set(_store_keys(model, adapter_name))
        selected = {key: value for key, value in state_dict.items() if key in keys}
        selected.update(cls._get_learnable_bias_state_dict(model, state_dict, config))
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        to_model = {}
        for key in _store_keys(model, adapter_name):
            saved = cls._remove_adapter_name_from_key(key, adapter_name)
            to_model[saved.removeprefix(_WRAPPED)] = key
        remapped = {
            to_model.get(key.removeprefix(_WRAPPED), key): value
            for key, value in state_dict.items()
        }
        raise_for(
            [f"{saved} is missing" for saved, key in to_model.items() if key not in remapped]
            + [
                f"{key} is not one of this adapter's"
                for key in remapped
                if ("msplora_" in key or ".lora_" in key) and key not in to_model.values()
            ]
        )
        return remapped


_WRAPPED = "base_model.model."


def _store_keys(model: nn.Module, adapter_name: str) -> list[str]:
    """The names that one adapter's tensors have in the model's state dict."""
    keys = []
    for path, module in model.named_modules():
        if isinstance(module, Store):
            prefix = path.replace("_fsdp_wrapped_module.", "")
            keys += [
                f"{prefix}.{name}"
                for name in module.state_dict()
                if name.split(".")[-2] == adapter_name
            ]
    return keys


def _do_nothing(layer: nn.Module, args: Any) -> None:
    pass


def _new_store(model: nn.Module) -> Store:
    if hasattr(model, STORE_NAME):
        raise TargetError(
            f"this {type(model).__name__} has an attribute {STORE_NAME!r} of its own, where the "
            f"adapter's tensors would be kept. Rename it, or adapt a part of the model."
        )
    store = Store()
    model.add_module(STORE_NAME, store)
    return store


def _bare(config: MSPLoraConfig, target: nn.Module) -> MSPLoraConfig:
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


def _base_of(model: nn.Module, key: str, plan: Plan) -> nn.Module:
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


def _check_made_for(
    plan: Plan, model: nn.Module, config: MSPLoraConfig, made_for: tuple[str | None, str | None]
) -> None:
    model_type, fingerprint = made_for
    found_type = _model_type(model)
    if model_type is not None and found_type is not None and model_type != found_type:
        raise AdapterFileError(
            f"the adapter was made for a base of type {model_type!r}, and this one is "
            f"{found_type!r} ({type(model).__name__}). Load the base it was made for"
            f"{_named(config)}."
        )
    if fingerprint is not None and fingerprint != plan.fingerprint:
        raise AdapterFileError(
            f"the adapter was made for another base: the names and shapes of its sites have the "
            f"hash {fingerprint}, this model's {len(plan.sites)} sites have {plan.fingerprint}. "
            f"Load the base it was made for{_named(config)}."
        )
    path = getattr(getattr(model, "config", None), "_name_or_path", None)
    if fingerprint and path and config.base_model_name_or_path not in (None, "", path):
        warnings.warn(
            f"the adapter names {config.base_model_name_or_path!r} as its base, and this model "
            f"comes from {path!r}: its sites fit, but make sure that the weights are the same.",
            stacklevel=3,
        )


def _named(config: MSPLoraConfig) -> str:
    return f", {config.base_model_name_or_path!r}" if config.base_model_name_or_path else ""


def _check_not_trained_whole(store: Store, config: MSPLoraConfig) -> None:
    for path, _ in store.named_modules(prefix=STORE_NAME):
        for name in config.modules_to_save or ():
            if path.endswith(name):
                raise ConfigError(
                    f"modules_to_save names {name!r}, which PEFT looks for at the end of a "
                    f"module's name and would find in the adapter's own {path!r}. Give the adapter "
                    f"another name, or name the module by a longer part of its path."
                )


def _check_every_site_borrows(model: nn.Module, plan: Plan, adapter_name: str) -> None:
    borrowing = {
        module.borrowed[adapter_name].site_key
        for module in model.modules()
        if isinstance(module, PyramidLayer) and adapter_name in module.borrowed
    }
    missing = sorted({*plan.pairs_of, *dict(plan.tied)} - borrowing)
    if missing:
        raise TargetError(
            f"PEFT adapted {len(borrowing)} of the {len(plan.sites)} planned sites; without an "
            f"adapter stayed {missing[:5]}. Please report this, with the model and the config."
        )


def _roll_back(
    model: nn.Module, before: Mapping[str, nn.Module], store: Store, adapter_name: str
) -> None:
    """Put the modules back that a failed injection replaced, and forget its pairs."""
    for path, module in before.items():
        parent_path, _, name = path.rpartition(".")
        parent = before.get(parent_path)
        if path and parent is not None and parent._modules.get(name) is not module:
            parent._modules[name] = module
    for module in before.values():
        if isinstance(module, PyramidLayer) and adapter_name in module.borrowed:
            module.delete_adapter(adapter_name)
    store.delete(adapter_name)
    if not store.plans and getattr(model, STORE_NAME, None) is store:
        delattr(model, STORE_NAME)


def _model_type(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        return config.get("model_type")
    return getattr(config, "model_type", None)
