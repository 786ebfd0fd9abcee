"""A tiny Llama with an adapter whose factors are random, and what most tests ask of it."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers.integrations.peft as host
from packaging.version import Version
from peft import get_peft_model
from torch import Tensor

import msplora
from oracle import (
    Untied,
    plan_of,
    randomise,
)
from tiny import MODELS

LLAMA = MODELS["llama"]
BATCH = LLAMA.batch()
TARGETS = ["q_proj", "v_proj"]


def config(**changes: Any) -> msplora.MSPLoraConfig:
    return msplora.MSPLoraConfig(**({"target_modules": TARGETS} | changes))


def adapted(base: Any = None, *, random: bool = True, **changes: Any) -> Any:
    model = get_peft_model(LLAMA.model() if base is None else base, config(**changes)).eval()
    if random:
        randomise(model)
    return model


def logits(model: Any, batch: dict[str, Tensor] = BATCH, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, **options).logits


def base_logits() -> Tensor:
    return logits(LLAMA.model())


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def step(model: Any, batch: dict[str, Tensor] = BATCH, rate: float = 0.1) -> None:
    """One step of plain gradient descent."""
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
                parameter.grad = None
    model.eval()


def two_adapters(**second: Any) -> Any:
    model = adapted()
    model.add_adapter("second", config(**second))
    randomise(model, "second", seed=11)
    return model


def delta_model(model: Any, weights: dict[str, float]) -> Any:
    """A plain copy of the base in whose weights the adapters' deltas are added, by the oracle."""
    plain: Any = LLAMA.model()
    untouched = LLAMA.model()
    for name, weight in weights.items():
        untied = Untied(untouched, model, plan_of(model, name), name)
        with torch.no_grad():
            for key, value in untied.weights.items():
                change = value - untouched.get_parameter(key)
                plain.get_parameter(key).add_(weight * change)
    return plain


def take_the_installed_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers 5.24 add adapters, for which it asks for a PEFT that is not released."""
    if Version(host.MIN_PEFT_VERSION) > Version(peft.__version__):
        monkeypatch.setattr(host, "check_peft_version", lambda **_: None)
