"""`HydraModel`: the tuner behind `get_peft_model(model, HydraConfig(...))`."""

from __future__ import annotations

from msplora.sisters.model import SisterModel

from .config import HydraConfig
from .layer import HydraLayer


class HydraModel(SisterModel):
    """PEFT's `LoraModel` with Hydra's layers."""

    prefix: str = "hydra_"
    layer_mixin = HydraLayer
    config_class = HydraConfig
