"""`ElaLoraModel`: the tuner behind `get_peft_model(model, ElaLoraConfig(...))`."""

from __future__ import annotations

from typing import Any

from torch import nn

from msplora import _peft
from msplora.errors import ConfigError, nearest
from msplora.sisters.model import SisterModel

from .config import ElaLoraConfig
from .layer import ElaLoraLayer, rank_of


class ElaLoraModel(SisterModel):
    """PEFT's `LoraModel` with layers whose ranks can change."""

    prefix: str = "elalora_"
    layer_mixin = ElaLoraLayer
    config_class = ElaLoraConfig

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Let PEFT replace the layers, and let those share the table of their ranks."""
        result = super().inject_adapter(model, adapter_name, *args, **kwargs)
        records = [
            its.records[adapter_name]
            for its in model.modules()
            if isinstance(its, ElaLoraLayer) and adapter_name in its.records
        ]
        config: Any = self.peft_config[adapter_name]
        _check_pattern(config, [its.key for its in records])
        ranks = {its.key: rank_of(its.config, its.key) for its in records}
        for its in records:
            its.ranks = ranks
        return result


def _check_pattern(config: ElaLoraConfig, keys: list[str]) -> None:
    for entry in config.rank_pattern or {}:
        if not any(key == entry or _peft.get_pattern_key([entry], key) != key for key in keys):
            raise ConfigError(
                f"rank_pattern[{entry!r}] matches none of the {len(keys)} layers that are adapted."
                f"{nearest(entry, keys, count=1)} Name the end of a layer's path, or a regular "
                f"expression for it, as for PEFT's LoRA."
            )
