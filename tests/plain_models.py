"""Adapting models that are no transformers, and every road an adapter takes from there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import msplora
from msplora.plain_lora import lora_of
from oracle import (
    plan_of,
    same_tensors,
    tensors_of,
    trainable,
)
from tiny import VOCABULARY


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    scale = max([1.0, *expected.detach().abs().flatten().tolist()])
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def wrapped(model: nn.Module, **changes: Any) -> Any:
    return get_peft_model(model, msplora.MSPLoraConfig(**changes)).eval()


def check_roads(model: Any, fresh: nn.Module, x: Tensor, folder: Path, merges: bool = True) -> None:
    """Counting, reloading, the exported LoRA and merging, on a model with random factors."""
    plan = plan_of(model)
    assert trainable(model) == plan.parameters
    expected = run(model, x)
    model.save_pretrained(folder / "own", save_embedding_layers=False)
    saved = load_file(folder / "own" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == plan.parameters
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(
            clone(fresh), folder / "own", is_trainable=True, **options
        ).eval()
        assert same_tensors(tensors_of(loaded), tensors_of(model))
        assert torch.equal(run(loaded, x), expected)
        model.train()
        (loaded(x) ** 2).sum().backward()
        gradients = [its.grad for its in loaded.parameters() if its.requires_grad]
        assert all(grad is not None and bool(grad.any()) for grad in gradients)
        model.eval()
    tensors, config = lora_of(model)
    (folder / "lora").mkdir()
    save_file(tensors, folder / "lora" / "adapter_model.safetensors")
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config))
    lora = PeftModel.from_pretrained(clone(fresh), folder / "lora").eval()
    lora.train()  # no dropout here; in eval PEFT's LoRA is passed by in an encoder layer
    assert close(run(lora, x), expected)
    if merges:
        model.merge_adapter()
        assert close(run(model, x), expected, 1e-4)
        model.unmerge_adapter()
        assert close(run(model, x), expected, 1e-4)
        assert close(run(model.merge_and_unload(safe_merge=True), x), expected, 1e-4)


def clone(model: nn.Module) -> Any:
    return copy.deepcopy(model)


def factors(model: Any) -> list[tuple[Tensor, Tensor, float]]:
    return list(msplora.factors(model).values())


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x
