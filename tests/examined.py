"""Tiny adapters on their bases for a doctor, on disk, and how to spoil them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import msplora
from msplora.diagnosis.results import Diagnosis
from oracle import randomise
from tiny import MODELS

WEIGHTS = "adapter_model.safetensors"


def scale_b(model: Any, by: float) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "msplora_B" in name or "lora_B" in name:
                parameter.mul_(by)
    return model


def save(folder: Path, name: str = "llama", by: float = 0.1, **changes: Any) -> tuple[str, Path]:
    """A tiny base and a pyramid of random factors on it, on disk."""
    tiny = MODELS[name]
    options = {"target_modules": tiny.targets}
    model: Any = get_peft_model(tiny.model(), msplora.MSPLoraConfig(**(options | changes)))
    randomise(model)
    tiny.model().save_pretrained(folder / "base")
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    scale_b(model, by).save_pretrained(folder / "adapter")
    return str(folder / "base"), folder / "adapter"


def save_lora(folder: Path, by: float = 1, **changes: Any) -> tuple[str, Path]:
    llama_base: Any = MODELS["llama"].model()
    llama_base.save_pretrained(folder / "base")
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = get_peft_model(llama_base, LoraConfig(**(options | changes)))
    scale_b(model, by).save_pretrained(folder / "adapter")
    return str(folder / "base"), folder / "adapter"


def edit(folder: Path, change: Any, file: str = WEIGHTS) -> None:
    tensors = {key: its.contiguous() for key, its in change(load_file(folder / file)).items()}
    save_file(tensors, folder / file, metadata={"format": "pt"})


def statuses(found: Diagnosis) -> dict[str, str]:
    return {check.name: check.status for check in found.checks}
