"""The adapted model under examination, and the logits that several checks compare with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from msplora.config import MSPLoraConfig
from msplora.probing import inputs_it_takes, logits

from .restored import Restored, adapted_layers, merged_and_unmerged


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
    is_whole: bool = True
    """Whether that file holds what its config asks for."""
    own_vocabulary: int | None = None
    """The tokens that the base's own config tells of."""
    revision: str | None = None
    """Of the base, where it is not the newest."""
    trust_remote_code: bool = False
    random_weights: str | None = None
    """What is said of weights that neither the base's files nor the adapter's have, if any."""
    random_pooler: str | None = None
    """The same of those that its outputs do not depend on."""

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
    def chooses(self) -> bool:
        """Whether its outputs are odds, of which the largest is an answer: it has a head."""
        with torch.inference_mode():
            return "logits" in self.model(**self.inputs)

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def is_quantized(self) -> bool:
        return bool(getattr(self.base, "is_quantized", False))

    @property
    def is_half(self) -> bool:
        """Whether rounding alone may move its outputs far: it grows from layer to layer."""
        return self.dtype in (torch.bfloat16, torch.float16)

    @property
    def has_experts(self) -> bool:
        """Whether rounding may send a token to other ones."""
        return any("expert" in path for path, _ in self.base.named_modules())

    @property
    def why_not_merged(self) -> str | None:
        """Why checks of merged weights are left out, if they are."""
        if self.is_quantized:
            return "The base is quantised: merging would round its weights a second time."
        return self.restored.why_not_merged

    @cached_property
    def restored(self) -> Restored:
        """The weights after merging and unmerging every layer once; they are put back."""
        return merged_and_unmerged(self.base)

    @cached_property
    def adapted(self) -> Tensor:
        """The logits with the adapter."""
        with inputs_it_takes(self.model, self.inputs, "Give rows of your own with --data."):
            return logits(self.model, self.inputs)

    @cached_property
    def plain(self) -> Tensor:
        """The logits without it, and with the head that was trained beside it."""
        with self.without_adapter():
            return logits(self.model, self.inputs)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Switch the adapter's layers off, and only them.

        `disable_adapter()` also swaps a trained head (modules_to_save) for the base's own, which of
        a classifier is newly initialised: that would compare two heads.
        """
        layers = [its for its in self.model.modules() if isinstance(its, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    @property
    def is_reached(self) -> bool:
        """Whether any of the adapter's layers runs on the inputs."""
        ran = []
        hooks = [
            layer.register_forward_hook(lambda *_, path=path: ran.append(path))
            for path, layer in adapted_layers(self.base)
        ]
        try:
            logits(self.model, self.inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return bool(ran)

    @property
    def why_not_compared(self) -> str | None:
        """Why outputs are not compared, if they are not."""
        if bool(self.adapted.isfinite().all()) and bool(self.plain.isfinite().all()):
            return None
        return "The output holds values that are not finite: there is nothing to compare with."

    @property
    def effect(self) -> float:
        """The largest change of a logit by the adapter."""
        return float((self.adapted - self.plain).abs().max())
