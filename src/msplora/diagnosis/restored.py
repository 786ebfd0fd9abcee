"""Every layer merged and unmerged once: whether PEFT can, and what comes back.

One layer at a time: besides the model, one layer's weights are held, and put back bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

_MOST_SAID = 300
"""Letters of PEFT's own errors."""


@dataclass(frozen=True)
class Restored:
    """The weights of all adapted layers after they were merged and unmerged."""

    parameters: int
    exact: int
    """Those that came back bit by bit."""
    error: float
    """The norm of the difference over that of the weights."""
    why_not_merged: str | None = None
    """What PEFT says of a layer that it cannot merge; then not all were tried."""


@torch.no_grad()
def merged_and_unmerged(model: nn.Module) -> Restored:
    """Merge and unmerge each layer of an adapted model; afterwards it is what it was."""
    squares, total, exact, count = 0.0, 0.0, 0, 0
    why_not = None
    for path, layer in adapted_layers(model):
        own = [
            its for name, its in layer.get_base_layer().named_parameters() if "lora_" not in name
        ]
        before = [its.detach().clone() for its in own]
        try:
            layer.merge()
            layer.unmerge()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # and what is not implemented
            why_not = f"PEFT cannot merge {path!r}: {' '.join(str(error).split())[:_MOST_SAID]}"
        for now, was in zip(own, before, strict=True):
            count += 1
            exact += int(torch.equal(now, was))
            squares += float((now.double() - was.double()).square().sum())
            total += float(was.double().square().sum())
            now.copy_(was)
        if why_not:
            break
    return Restored(count, exact, (squares / total) ** 0.5 if total else 0.0, why_not)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapter's layers, by their paths."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.scaling:
            yield path, module
