"""The adapted model under examination, and the logits that several checks compare with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from msplora.config import MSPLoraConfig
from msplora.verifying import logits


@dataclass
class Patient:
    """An adapter on its base."""

    folder: Path
    """The adapter's."""
    source: str
    """The base's path or hub id."""
    model: PeftModel
    inputs: dict[str, Tensor]
    tensors: dict[str, Tensor]
    """Of the adapter's file."""

    @property
    def config(self) -> Any:
        return self.model.peft_config["default"]

    @property
    def is_pyramid(self) -> bool:
        return isinstance(self.config, MSPLoraConfig)

    @property
    def base(self) -> Any:
        return self.model.get_base_model()

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def why_not_merged(self) -> str | None:
        """Why checks of merged weights are left out, if they are."""
        if getattr(self.base, "is_quantized", False):
            return "The base is quantised: merging would round its weights a second time."
        return None

    @cached_property
    def adapted(self) -> Tensor:
        """The logits with the adapter."""
        return logits(self.model, self.inputs)

    @cached_property
    def plain(self) -> Tensor:
        """The logits without it."""
        with self.model.disable_adapter():
            return logits(self.model, self.inputs)

    @property
    def effect(self) -> float:
        """The largest change of a logit by the adapter."""
        return float((self.adapted - self.plain).abs().max())
