"""Small adapters to inspect, and how to spoil them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import msplora
from msplora.inspection.results import Finding, Inspection
from msplora.inspection.suspicions import RULES
from tiny import llama

WEIGHTS = "adapter_model.safetensors"


def scaled(model: Any, by: float = 0.1) -> Any:
    """Random factors, made small enough to be an adapter's."""
    with torch.no_grad():
        for _, b, _ in msplora.factors(model).values():
            b.mul_(by)
    return model


def lora(folder: Path, model: Any = None, **changes: Any) -> Path:
    torch.manual_seed(0)  # random factors may be as large as what is suspicious
    options = {"r": 3, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    adapter: Any = get_peft_model(model or llama(), LoraConfig(**(options | changes)))
    adapter.save_pretrained(folder)
    return folder


def edit(folder: Path, change: Any) -> None:
    """Change the tensors of an adapter's file."""
    tensors = change(load_file(folder / WEIGHTS))
    save_file({key: its.contiguous() for key, its in tensors.items()}, folder / WEIGHTS)


def set_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def the(found: Inspection, rule: str) -> Finding:
    """The one finding of a rule, and nothing else that is suspicious."""
    (finding,) = [its for its in found.findings if its.severity != "note"]
    assert finding.rule == rule
    assert rule in RULES
    assert "\n" not in finding.text
    return finding
