"""`MSPLoraModel`: wires the plan, the store and the layers into PEFT's LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from . import _peft
from .config import MSPLoraConfig
from .injecting import (
    bare_config,
    base_of,
    check_every_site_borrows,
    check_made_for,
    check_name_is_free,
    check_not_trained_whole,
    check_request,
    check_type,
    new_store,
    roll_back,
)
from .layer import PyramidLayer, make_pyramid_layer
from .matching import STORE_NAME, model_type_of
from .planning import make_plan, prepared
from .pyramid import Plan
from .saving import shapes_in, tensors_to_save
from .store import Store, find_store, raise_for
from .weighted import combined_adapter, take_over_whole


class MSPLoraModel(LoraModel):
    """The tuner behind `get_peft_model(model, MSPLoraConfig(...))`.

    Everything a LoRA does, it inherits; it differs in who owns the factors. Planning happens in
    `inject_adapter`, the one road that every way of adding an adapter takes.
    """

    prefix: str = _peft.PREFIX

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        # If the model has adapters already, PEFT first puts the new config into their dictionary.
        held: Any = getattr(model, "peft_config", None)
        before = dict(held) if isinstance(held, dict) else {}
        try:
            super().__init__(model, *args, **kwargs)
        except BaseException:
            if isinstance(held, dict):
                held.clear()
                held.update(before)
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # A call, where older PEFT releases ask for `forward` past the hooks that `stacking.py` has.
        return self.model(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PEFT's models call and generate in."""
        try:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
        finally:
            # Hooks on modules do not hear of a call that a Ctrl-C has ended.
            store = find_store(self.model)
            if store is not None:
                store.stacks.abandon()

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Plan, create the pairs, then let PEFT replace the layers; undo all of it on an error."""
        check_name_is_free(model, adapter_name)  # else undoing would take the other one away
        try:
            self._inject(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except BaseException:
            # The model may have had other adapters: then this is the dictionary it keeps.
            self.peft_config.pop(adapter_name, None)
            raise

    def _inject(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
        state_dict: dict[str, Tensor] | None,
    ) -> None:
        config: Any = self.peft_config[adapter_name]
        made_for = check_request(model, adapter_name, config, state_dict)
        self._check_new_adapter_config(config)
        check_type(model, config, made_for[0])
        spelled_out = prepared(model, config)
        plan = make_plan(model, spelled_out)
        check_made_for(plan, model, config, made_for[1])
        config.target_modules = spelled_out.target_modules
        for note in plan.notes:
            if "outside every list" in note or "Name them in target_parameters" in note:
                warnings.warn(note, stacklevel=3)

        modules_before = dict(model.named_modules())
        existing = find_store(model)
        store = existing or new_store(model)
        # Older releases freeze the first adapter when a second is loaded for inference.
        trainable = [(its, its.requires_grad) for its in store.parameters()]
        try:
            self._create_pairs(model, store, plan, adapter_name, config, low_cpu_mem_usage)
            check_not_trained_whole(store, config)
            self._lending = (store, plan)
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
            if existing is None:  # only now: PEFT walks over all modules several times
                model.add_module(STORE_NAME, store)
            else:
                store.stacks.unwatch(model)
            layers = {
                path: its for path, its in model.named_modules() if isinstance(its, PyramidLayer)
            }
            check_every_site_borrows(layers.values(), plan, adapter_name)
            store.stacks.watch(model, layers)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
        except BaseException:
            roll_back(model, modules_before, store, adapter_name)
            raise
        finally:
            self.__dict__.pop("_lending", None)
        config.record_base(model_type_of(model), plan.fingerprint)

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
            base = base_of(model, pair.sites[0], plan)
            device = _peft.device_of(base) or torch.device("cpu")
            if low_cpu_mem_usage:
                device = torch.device("meta")
            # Also where PEFT would take the base's half precision: it casts afterwards, except on
            # the roads past `PeftModel`, which would round a saved adapter.
            dtype = _peft.new_adapter_dtype(base)
            where[pair.address] = (torch.float32 if dtype in _HALF else dtype, device)
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
                bare_config(lora_config, target),
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
        store, plan = self._lending
        embedding = dict(plan.tied).get(key)
        pairs = plan.pairs_of[embedding or key]
        base = layer.base_layer
        if embedding is not None:  # which merges into the weight that both have
            layer.merged_by_another = True
        transposed = embedding is not None and not isinstance(base, nn.Embedding)
        layer.borrow(store, adapter_name, pairs, config, key, transposed)
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
        if _peft.GOES_BY_NAMES:  # and spares a base's own tensors if they are named like ours
            for name, parameter in model.named_parameters():
                if self.prefix in name:
                    parameter.requires_grad_(False)
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
        if store is None or adapter_name not in store.plans:
            return
        if autocast_adapter_dtype:
            store.cast(adapter_name, set(_HALF), torch.float32)
            return
        plan = store.plans[adapter_name]
        for pair in plan.pairs:
            dtype = _peft.new_adapter_dtype(base_of(self.model, pair.sites[0], plan))
            for factor in store.pair(pair.address, adapter_name):
                factor.to(dtype)
        for layer in self.model.modules():
            if isinstance(layer, PyramidLayer):
                layer.cast_magnitude(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        store = find_store(self.model)
        if store is not None:
            store.delete(adapter_name)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        unloaded: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        store = getattr(unloaded, STORE_NAME, None)
        if isinstance(store, Store):
            store.stacks.unwatch(unloaded)
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

        A module that one of them trains whole (a classifier's head), and its trained tokens, are
        taken over as they are, whatever the weights.

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
        take_over_whole(self.model, adapters, adapter_name)

    # What PEFT saves and loads: hooks that are new in PEFT 0.21 (see `_peft_older.py`).

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        selected = tensors_to_save(model, adapter_name, state_dict)
        selected.update(cls._get_learnable_bias_state_dict(model, state_dict, config))
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        parts = key.split(".")  # … . msplora_A . <adapter> . factor
        if len(parts) > 2 and parts[-2] == adapter_name and parts[-3].startswith(_peft.PREFIX):
            del parts[-2]
        return ".".join(parts)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        to_model = {}
        for key in shapes_in(model, adapter_name):
            saved = cls._remove_adapter_name_from_key(key, adapter_name)
            to_model[saved.removeprefix(_WRAPPED)] = key
        remapped = {
            to_model.get(key.removeprefix(_WRAPPED), key): value
            for key, value in state_dict.items()
        }
        # A module of the base may be named like an adapter's, `lora_head`, and be trained whole.
        known = {*to_model.values(), *model.state_dict()}
        raise_for(
            [f"{saved} is missing" for saved, key in to_model.items() if key not in remapped]
            + [
                f"{key} is not one of this adapter's"
                for key in remapped
                if ("msplora_" in key or ".lora_" in key) and key not in known
            ]
        )
        return remapped


_HALF = (torch.float16, torch.bfloat16)
_WRAPPED = "base_model.model."


def _do_nothing(layer: nn.Module, args: Any) -> None:
    pass
