"""`ElaLoraModel`: the tuner behind `get_peft_model(model, ElaLoraConfig(...))`."""

from __future__ import annotations

from msplora.sisters.model import SisterModel

from .config import ElaLoraConfig
from .layer import ElaLoraLayer


class ElaLoraModel(SisterModel):
    """PEFT's `LoraModel` with layers whose ranks can change."""

    prefix: str = "elalora_"
    layer_mixin = ElaLoraLayer
    config_class = ElaLoraConfig
