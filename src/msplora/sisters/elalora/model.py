"""`ElaLoraModel`: the tuner behind `get_peft_model(model, ElaLoraConfig(...))`."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from msplora.errors import AdapterFileError
from msplora.sisters.model import SisterModel

from .config import ElaLoraConfig
from .layer import ElaLoraLayer, adapted_layers, rank_of


class ElaLoraModel(SisterModel):
    """PEFT's `LoraModel` with layers whose ranks can change."""

    prefix: str = "elalora_"
    layer_mixin = ElaLoraLayer
    config_class = ElaLoraConfig

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Let PEFT replace the layers, and let those share the table of their ranks."""
        # Moves write the ranks into it, and the caller's may be another adapter's as well.
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = adapted_layers(model, adapter_name).values()
        records = [its.records[adapter_name] for its in layers]
        ranks = {its.key: rank_of(its.config, its.key) for its in records}
        for its in records:
            its.ranks = ranks

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # Files of earlier versions name the factors without a weight in them.
        named = {
            f"{key}.weight" if key.rpartition(".")[2] in ElaLoraLayer.containers else key: its
            for key, its in state_dict.items()
        }
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, named)
        # Loading into an adapter that is there reads no config, so the layers would take on the
        # ranks of an adapter of another r, and keep a scale that is not its own.
        wanted = sum(its.r[adapter_name] for its in adapted_layers(model, adapter_name).values())
        ending = f".elalora_E.{adapter_name}.weight"
        found = sum(len(its) for name, its in remapped.items() if name.endswith(ending))
        if found != wanted:
            raise AdapterFileError(
                f"the adapter's file has {found} ranks in all, and the adapter {adapter_name!r} "
                f"that it is loaded into has {wanted}. Moves keep the sum, so it was made with "
                f"another r, and its scale (lora_alpha / r) is another. Load it under a new name, "
                f"with its own config."
            )
        return remapped
