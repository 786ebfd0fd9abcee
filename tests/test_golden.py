"""Against float64 reference vectors of an independent implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import msplora
from msplora.pyramid import Level


class Golden:
    """The reference model with its factors put into an msplora adapter."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        case = json.loads((folder / "msp_llama6.json").read_text())
        sizes = case["config"]
        self.arrays = load_file(folder / "msp_llama6.safetensors")
        config: Any = LlamaConfig(
            num_hidden_layers=case["layers"],
            vocab_size=sizes["vocab"],
            hidden_size=sizes["hidden"],
            intermediate_size=sizes["inter"],
            num_attention_heads=sizes["heads"],
            num_key_value_heads=sizes["kv"],
            rms_norm_eps=sizes["eps"],
            rope_parameters={"rope_type": "default", "rope_theta": sizes["theta"]},
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(config).to(dtype)
        weights = {
            name.removeprefix("base."): tensor.to(dtype)
            for name, tensor in self.arrays.items()
            if name.startswith("base.")
        }
        model.load_state_dict(weights, strict=True)
        self.base = model
        self.input_ids = self.arrays["input_ids"].long()
        self.model = get_peft_model(
            model, msplora.MSPLoraConfig(r=8, lora_alpha=16, target_modules=case["targets"])
        )
        self.factors = msplora.factors(self.model)

    def fill(self) -> None:
        with torch.no_grad():
            for address, (a, b, _) in self.factors.items():
                a.copy_(self.arrays[f"factor.{reference_name(address)}.A"])
                b.copy_(self.arrays[f"factor.{reference_name(address)}.B"])

    def logits(self) -> torch.Tensor:
        return self.model(self.input_ids).logits


def reference_name(address: str) -> str:
    """``mid/2/self_attn.q_proj`` is ``mid.2.q_proj`` there, and the global level has no group."""
    level, group, kind = address.split("/")
    kind = kind.rpartition(".")[2]
    return f"global.{kind}" if level == "global" else f"{level}.{group}.{kind}"


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def golden(shared: Path, request: pytest.FixtureRequest) -> Golden:
    return Golden(shared / "golden", request.param)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_base_and_adapted_logits(golden: Golden) -> None:
    assert close(golden.logits(), golden.arrays["out.base.logits"])
    golden.fill()
    assert close(golden.logits(), golden.arrays["out.paper.logits"])
    assert not close(golden.logits(), golden.arrays["out.ref_forward.logits"])


def test_every_gradient(golden: Golden) -> None:
    golden.fill()
    (golden.arrays["cotangent"] * golden.logits()).sum().backward()
    for address, (a, b, _) in golden.factors.items():
        for name, parameter in (("A", a), ("B", b)):
            expected = golden.arrays[f"grad.paper.{reference_name(address)}.{name}"]
            assert parameter.grad is not None
            # Gradients reach a few hundred, so the tolerance is relative.
            scale = max(1.0, float(expected.abs().max()))
            assert close(parameter.grad / scale, expected / scale), (address, name)


def test_deltas(golden: Golden) -> None:
    golden.fill()
    layers = dict(golden.base.named_modules())
    for layer in (0, 3, 5):
        for kind in ("q_proj", "v_proj"):
            site: Any = layers[f"model.layers.{layer}.self_attn.{kind}"]
            expected = golden.arrays[f"delta.paper.{layer}.{kind}"]
            assert close(site.get_delta_weight("default"), expected)


def test_merged_logits(golden: Golden) -> None:
    golden.fill()
    merged: Any = golden.model.merge_and_unload()
    assert close(merged(golden.input_ids).logits, golden.arrays["out.paper.logits"])


def test_a_wrong_grouping_is_noticed(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Level.group_of

    def rotated(level: Level, depth: int, layers: int) -> int:
        return right(level, (depth + 1) % layers, layers)

    monkeypatch.setattr(Level, "group_of", rotated)
    golden = Golden(shared / "golden", torch.float32)
    golden.fill()
    assert not close(golden.logits(), golden.arrays["out.paper.logits"])
