"""A pyramid's config from a LoRA's, as other people's trainers make it from their own options."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from peft import LoraConfig

from msplora.config import MSPLoraConfig


def pyramid_of(lora: LoraConfig, **more: Any) -> MSPLoraConfig:
    """Return the pyramid that has what is asked of a LoRA, and the fields `more` besides.

    Ranks and alphas given level by level stand in for the LoRA's one rank and one alpha; a field
    in `more` that is `None` was not given.

    Raises:
        MSPLoraError: what is asked has no meaning for a pyramid.
    """
    usual = LoraConfig()
    asked = {
        field.name: getattr(lora, field.name)
        for field in fields(lora)
        if field.init and getattr(lora, field.name) != getattr(usual, field.name)
    }
    asked |= {"r": lora.r, "lora_alpha": lora.lora_alpha}
    more = {name: value for name, value in more.items() if value is not None}
    for listed, single in (("ranks", "r"), ("alphas", "lora_alpha")):
        if listed in more:
            del asked[single]
    return MSPLoraConfig(**asked, **more)
