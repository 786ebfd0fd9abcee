"""A base in 4 or 8 bits, on the CPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

import msplora
from msplora.sisters import ElaLoraConfig, HydraConfig
from oracle import assert_shared, levels_of, plan_of, randomise, term, trainable, watched
from tiny import MODELS, llama

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
BATCH = MODELS["llama"].batch()


@pytest.fixture(params=[4, 8], ids=["4-bit", "8-bit"])
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A function that loads the same quantised Llama each time."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.manual_seed(0)
    llama(4, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantised = BitsAndBytesConfig(
        load_in_4bit=request.param == 4,
        load_in_8bit=request.param == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    return lambda: AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantised, device_map={"": "cpu"}
    )


def adapted(base: Any) -> Any:
    return get_peft_model(base, msplora.MSPLoraConfig(target_modules="all-linear")).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def test_it_starts_at_the_base_and_every_level_acts(load: Any) -> None:
    base = load()
    expected = logits(base)
    model = adapted(base)
    assert torch.equal(logits(model), expected)
    randomise(model)
    plan = plan_of(model)
    assert_shared(model, plan)
    with watched(model, plan) as calls:
        model(**BATCH)
    assert len(calls) == len(plan.sites) == 7 * 4
    for call in calls:
        expected = sum(
            term(call.site, call.base(), call.x, a, b, scale)
            for _, a, b, scale in levels_of(model, call.site, plan)
        )
        assert torch.allclose(call.change(), expected, rtol=1e-3, atol=1e-3), call.site.key


def test_it_trains_and_comes_back(load: Any, tmp_path: Path) -> None:
    model = adapted(load())
    randomise(model)
    assert trainable(model) == plan_of(model).parameters
    model.train()
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    assert all(bool(b.grad.any()) for _, b, _ in msplora.factors(model).values())
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))
    with torch.no_grad():
        rows = model(**BATCH, adapter_names=["__base__", "default"]).logits
    assert torch.allclose(rows[1], logits(model)[1], rtol=1e-2, atol=1e-2)
    with model.disable_adapter():
        assert torch.allclose(rows[0], logits(model)[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("config", [HydraConfig, ElaLoraConfig])
def test_a_sister_runs_on_it_and_merges_into_it(load: Any, config: Any) -> None:
    model: Any = get_peft_model(load(), config(target_modules=["q_proj", "v_proj"])).eval()
    base = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    adapted_logits = logits(model)
    assert (adapted_logits - base).abs().max() > 0.01
    site = model.base_model.model.model.layers[1].self_attn.q_proj
    before = dequantize_module_weight(site.get_base_layer())
    expected = before + site.get_delta_weight("default")
    model.merge_adapter()
    found = dequantize_module_weight(site.get_base_layer())
    # It is rounded to so many bits once more.
    assert (found - expected).norm() < 0.2 * (expected - before).norm()
