"""Hydra: against reference vectors, and merging, whose weight depends on the base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from msplora.errors import ConfigError, UnsupportedError
from msplora.sisters import HydraConfig

FACTORS = {
    "hydra_parallel_A": ("Ap", "apb"),
    "hydra_parallel_B": ("Bp", "bpb"),
    "hydra_sequential_A": ("As", "asb"),
    "hydra_sequential_B": ("Bs", "bsb"),
}


def layer(bias: bool = True, branch_bias: bool = False, transposed: bool = False) -> Any:
    """One adapted layer, in float64, whose factors are random."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base: nn.Module = Conv1D(16, 24) if transposed else nn.Linear(24, 16, bias=bias)
    config = HydraConfig(
        r_parallel=4, r_sequential=2, scale=0.5, branch_bias=branch_bias, target_modules=["0"]
    )
    model: Any = get_peft_model(nn.Sequential(base).double(), config)
    randomise(model, seed=1)
    return model


def randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tag", ["nobias", "bias"])
def test_reference_vectors(shared: Path, tag: str) -> None:
    arrays = {
        name: tensor.double()
        for name, tensor in load_file(shared / "golden" / "hydra_linear.safetensors").items()
    }
    model = layer(branch_bias=tag == "bias")
    site = model.base_model.model[0]
    with torch.no_grad():
        site.base_layer.weight.copy_(arrays["W0"])
        site.base_layer.bias.copy_(arrays["b0"])
        for name, (weight, bias) in FACTORS.items():
            factor = getattr(site, name)["default"]
            factor.weight.copy_(arrays[weight])
            if tag == "bias":
                factor.bias.copy_(arrays[bias])
    x = arrays["x"].requires_grad_(True)
    y = model(x)
    assert close(y, arrays[f"out.{tag}.y"])
    (arrays["cot"] * y).sum().backward()
    assert x.grad is not None
    assert close(x.grad, arrays[f"grad.{tag}.x"])
    for name, (weight, bias) in FACTORS.items():
        factor = getattr(site, name)["default"]
        assert close(factor.weight.grad, arrays[f"grad.{tag}.{weight}"]), weight
        if tag == "bias":
            assert close(factor.bias.grad, arrays[f"grad.{tag}.{bias}"]), bias
    merged = model.merge_and_unload()[0]
    assert close(merged.weight, arrays[f"out.{tag}.W"])
    assert close(merged.bias, arrays[f"out.{tag}.b"])


@pytest.mark.parametrize("transposed", [False, True])
def test_two_merged_adapters_are_two_active_ones_and_come_out_again(transposed: bool) -> None:
    model = layer(transposed=transposed)
    x = torch.randn(3, 24, dtype=torch.float64)
    with model.disable_adapter():
        base = model(x)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    randomise(model, seed=2)
    adapted = model(x)
    assert not close(adapted, base)
    # One after the other: the second one's branch must read the base's output all the same.
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    assert close(model(x), adapted)
    model.unmerge_adapter()
    assert close(model(x), adapted)
    with model.disable_adapter():
        assert close(model(x), base)


def test_what_is_merged_into_a_bias_follows_the_model() -> None:
    model = layer().to(torch.float32)
    model.add_adapter("second", model.peft_config["default"])
    model.merge_adapter(["default"])
    model.to("meta")
    model.merge_adapter(["second"])
    model.unmerge_adapter()
    assert model.base_model.model[0].base_layer.bias.is_meta


def test_a_bias_that_has_no_place_is_not_merged() -> None:
    model = layer(bias=False, branch_bias=True)
    before = model.base_model.model[0].base_layer.weight.clone()
    with pytest.raises(UnsupportedError, match="branch_bias=False"):
        model.merge_adapter()
    assert torch.equal(model.base_model.model[0].base_layer.weight, before)


def test_without_biases_it_converts_to_a_plain_lora() -> None:
    model = layer(bias=False)
    site = model.base_model.model[0]
    assert site.supports_lora_conversion()
    a, b = site.lora_A["default"].weight, site.lora_B["default"].weight
    assert a.shape == (6, 24)
    assert b.shape == (16, 6)
    x = torch.randn(3, 24, dtype=torch.float64)
    assert close(x @ (site.base_layer.weight + 0.5 * b @ a).T, model(x))
    assert not layer(bias=True).base_model.model[0].supports_lora_conversion()


def test_dropout_is_between_the_factors() -> None:
    """Of the input it would leave the biases of A too, and of the output nothing."""
    model = layer(branch_bias=True)
    site = model.base_model.model[0]
    site.lora_dropout["default"] = nn.Dropout(1.0)
    x = torch.randn(3, 24, dtype=torch.float64)
    model.train()
    with model.disable_adapter():
        base = model(x)
    parallel, sequential = (its.b_O for its in site.branches("default"))
    assert close(model(x), base + 0.5 * (parallel + sequential))
    model.eval()
    assert not close(model(x), base + 0.5 * (parallel + sequential))


def test_a_config_made_of_another_has_the_ranks_it_asks_for() -> None:
    config = replace(HydraConfig(), r_parallel=8, scale=0.5)
    assert (config.r, config.lora_alpha) == (16, 8.0)
    loaded = HydraConfig(**json.loads(json.dumps(config.to_dict())))
    assert replace(loaded, r_sequential=1).r == 9
    with pytest.raises(ConfigError, match="r = 3: "):
        replace(config, r=3)
    assert {type(config.to_dict()[name]) for name in ("r", "lora_alpha")} == {int, float}


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="Leave r out"):
        HydraConfig(r=8)
    with pytest.raises(ConfigError, match="r_parallel = 0"):
        HydraConfig(r_parallel=0)
    with pytest.raises(ConfigError, match="scale = -1"):
        HydraConfig(scale=-1)
    with pytest.raises(UnsupportedError, match="use_dora=True"):
        HydraConfig(use_dora=True)
    with pytest.raises(UnsupportedError, match="pissa"):
        HydraConfig(init_lora_weights="pissa")
    assert HydraConfig(r_parallel=3, r_sequential=5, scale=2.0).r == 8
