"""What the sisters' tuners have in common: PEFT's `LoraModel` with another kind of layer."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from msplora import _peft
from msplora.errors import AdapterFileError, ConfigError, UnsupportedError
from msplora.injecting import put_back
from msplora.matching import check_everything_matched, find_targets, own_modules
from msplora.planning import prepared

from .layer import SisterLayer, change_class


class SisterModel(LoraModel):
    """The tuner of a sister; `layer_mixin` is its kind of layer, `config_class` its config."""

    layer_mixin: type[SisterLayer]
    config_class: type[LoraConfig]

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Check what is asked for, then let PEFT replace the layers; undo all of it on an error."""
        before = dict(model.named_modules())
        without_it: list[Any] = [
            its
            for its in before.values()
            if isinstance(its, SisterLayer) and not its.tensor_names(adapter_name)
        ]
        trainable = [(its, its.requires_grad) for its in model.parameters()]
        try:
            self._check_request(adapter_name)
            if state_dict is None:  # else PEFT goes by the names in it
                self._check_names(model, self.peft_config[adapter_name])
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
        except BaseException:
            put_back(before)
            for layer in without_it:
                layer.delete_adapter(adapter_name)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            # The model may have had other adapters: then this is the dictionary it keeps.
            self.peft_config.pop(adapter_name, None)
            raise

    def _check_request(self, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        if not isinstance(config, self.config_class):
            raise UnsupportedError(
                f"a model with {self._method} adapters takes a {self.config_class.__name__}, not a "
                f"{type(config).__name__}; PEFT cannot mix methods in one model."
            )
        if adapter_name in self.prefix or "." in adapter_name:
            raise ConfigError(
                f"the adapter's name {adapter_name!r} contains a dot or is part of "
                f"{self.prefix!r}, which marks its tensors: PEFT would not find them again. Choose "
                f"another name."
            )

    def _check_names(self, model: nn.Module, config: Any) -> None:
        spelled_out = prepared(model, config)
        modules = dict(own_modules(model))
        check_everything_matched(modules, spelled_out, find_targets(modules, spelled_out))
        config.target_modules = spelled_out.target_modules

    @property
    def _method(self) -> str:
        return self.layer_mixin.method

    def _create_and_replace(
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **options: Any,
    ) -> None:
        layer: Any = target
        if not isinstance(target, self.layer_mixin):
            self._check_target(target, current_key)
            super()._create_and_replace(
                _bare_config(lora_config, target),
                adapter_name,
                target,
                target_name,
                parent,
                current_key,
                **options,
            )
            layer = change_class(getattr(parent, target_name), self.layer_mixin)
        layer.add(adapter_name, lora_config, current_key)

    def _check_target(self, target: nn.Module, key: str) -> None:
        if isinstance(target, _peft.BaseTunerLayer):
            # A sister's layer goes by the name of PEFT's class.
            its = target.method if isinstance(target, SisterLayer) else type(target).__name__
            raise UnsupportedError(
                f"{key!r} already carries an adapter of {its}, and {self._method} does not go on "
                f"top of another method; merge or unload that one first."
            )
        other = (nn.Embedding, nn.MultiheadAttention, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        if isinstance(target, other) or _peft.in_out_features(target)[0] is None:
            raise UnsupportedError(
                f"{self._method} adapts linear layers, and {key!r} is a {type(target).__name__}. "
                f"Leave it out of target_modules."
            )

    def _check_target_module_compatiblity(self, peft_config: Any, model: Any, name: str) -> None:
        # PEFT goes by its own methods, and a sister is a LoRA: where the model reads a layer's
        # weight past the layer, as Mamba does, it would not act either.
        try:
            super()._check_target_module_compatiblity(LoraConfig(), model, name)
        except ValueError as error:
            raise UnsupportedError(
                f"{self._method} is a LoRA in each layer, and PEFT says of that: {error}"
            ) from error

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedError(
                f"{self._method} does not run batches whose rows have different adapters "
                f"(adapter_names). Choose one with set_adapter."
            )
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(
            f"{self._method} adapters cannot be added up in a new one: the sum is none of its kind."
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # New in PEFT 0.21: it only warns of what a file lacks, and leaves it as it was made.
        remapped: Any = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        expected = {
            f"{path}.{name}"
            for path, layer in model.named_modules()
            if isinstance(layer, SisterLayer)
            for name in layer.tensor_names(adapter_name)
        }
        missing = sorted(expected - set(remapped))
        left_over = sorted(
            name for name in remapped if f".{cls.prefix}" in name and name not in expected
        )
        if missing or left_over:
            told = [f"{name} is missing" for name in missing]
            told += [f"{name} is not one of this adapter's" for name in left_over]
            raise AdapterFileError(
                f"the adapter's file does not fit the model: {'; '.join(told[:5])}"
                f"{f' and {len(told) - 5} more' if len(told) > 5 else ''}. Load the base it was "
                f"made for."
            )
        return remapped


def _bare_config(config: LoraConfig, target: nn.Module) -> LoraConfig:
    """A config by which PEFT builds its layer with the least of factors: they are replaced."""
    return LoraConfig(
        r=1,
        lora_alpha=1,
        init_lora_weights=False,
        fan_in_fan_out=isinstance(target, Conv1D) or config.fan_in_fan_out,
        inference_mode=config.inference_mode,
        runtime_config=config.runtime_config,
    )
