"""`HydraModel`: the tuner behind `get_peft_model(model, HydraConfig(...))`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from msplora.sisters.model import SisterModel

from .config import HydraConfig
from .layer import HydraLayer, nowhere_to_merge


class HydraModel(SisterModel):
    """PEFT's `LoraModel` with Hydra's layers."""

    prefix: str = "hydra_"
    layer_mixin = HydraLayer
    config_class = HydraConfig

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge adapters, the active ones unless named, as PEFT does.

        Raises:
            UnsupportedError: a layer has no bias for those of its branches; none is merged then.
        """
        self._check_biases(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """Merge adapters, the active ones unless named, and return the base without any.

        Raises:
            UnsupportedError: a layer has no bias for those of its branches; none is merged then.
        """
        self._check_biases(adapter_names)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _check_biases(self, adapter_names: list[str] | None) -> None:
        # Of all layers first: PEFT merges one after the other, and an error would leave the model
        # with some of them merged.
        lacking = layers_without_bias(self.model, adapter_names)
        if lacking:
            more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
            raise nowhere_to_merge(f"{lacking[0]!r}{more}")


def layers_without_bias(
    model: nn.Module, adapter_names: Collection[str] | None = None
) -> list[str]:
    """The paths of the layers that lack a bias into which an adapter's biases could be merged.

    Args:
        model: with Hydra adapters, or without.
        adapter_names: the adapters that are to be merged; the active ones if left out.
    """
    found = []
    for path, module in model.named_modules():
        layer: Any = module
        if isinstance(module, HydraLayer):
            names = layer.active_adapters if adapter_names is None else adapter_names
            if any(module.lacks_bias(name) for name in names):
                found.append(path)
    return found
