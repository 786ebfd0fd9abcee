"""What every sister has to do as a PEFT adapter: start, save, reload, switch, merge."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import msplora
from adapted_llama import BATCH, LLAMA, base_logits, close, logits, step, take_the_installed_peft
from msplora.errors import ConfigError, MSPLoraError, UnsupportedError
from msplora.sisters import ElaLoraConfig, HydraConfig
from tiny import MODELS

CONFIGS: dict[str, Any] = {"hydra": HydraConfig, "elalora": ElaLoraConfig}
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(params=CONFIGS)
def config_of(request: pytest.FixtureRequest) -> Any:
    return CONFIGS[request.param]


def randomise(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapted(config_of: Any, **changes: Any) -> Any:
    model = get_peft_model(LLAMA.model(), config_of(target_modules=TARGETS, **changes)).eval()
    randomise(model)
    return model


def trainable(model: nn.Module) -> int:
    return sum(its.numel() for its in model.parameters() if its.requires_grad)


def test_it_starts_as_the_base_and_trains_nothing_else(config_of: Any) -> None:
    model = get_peft_model(LLAMA.model(), config_of(target_modules=TARGETS)).eval()
    assert torch.equal(logits(model), base_logits())
    prefix = model.base_model.prefix
    randomise(model)
    before = {name: its.clone() for name, its in model.named_parameters()}
    step(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (prefix not in name), name


def test_reloaded_is_saved(config_of: Any, tmp_path: Path) -> None:
    model = adapted(config_of)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(its.numel() for its in saved.values()) == trainable(model)
    for low in (False, True):
        again = peft.PeftModel.from_pretrained(LLAMA.model(), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(logits(again), logits(model))
    automatic = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert type(automatic) is config_of


def test_transformers_loads_it(
    config_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_the_installed_peft(monkeypatch)
    model = adapted(config_of)
    model.save_pretrained(tmp_path)
    plain = LLAMA.model()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain), logits(model))


def test_copies_are_alike(config_of: Any) -> None:
    model = adapted(config_of)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), logits(model))
        with torch.no_grad():  # and share nothing
            next(its for its in again.parameters() if its.requires_grad).zero_()
        assert not torch.equal(logits(again), logits(model))


def test_several_adapters(config_of: Any, tmp_path: Path) -> None:
    model = adapted(config_of)
    first = logits(model)
    model.save_pretrained(tmp_path)
    model.add_adapter("second", config_of(target_modules=["v_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), base_logits())
    assert all(".second" in name for name, its in model.named_parameters() if its.requires_grad)
    randomise(model, seed=2)
    assert not close(logits(model), base_logits())
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits())
    model.load_adapter(str(tmp_path), "third")
    model.set_adapter("third")
    assert torch.equal(logits(model), first)
    model.delete_adapter("third")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert not any(".third" in name for name in model.state_dict())


def test_whether_there_is_a_factor_is_told_without_computing_it(
    config_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT asks so of each active adapter in every pass; Hydra's A is a product with W0."""
    model = adapted(config_of)
    site = model.base_model.model.model.layers[0].self_attn.q_proj
    for name in ("a_RI", "b_OR"):
        monkeypatch.setattr(type(site), name, lambda *_: pytest.fail("a factor was computed"))
    for factors in (site.lora_A, site.lora_B):
        for its in (factors, factors.keys()):
            assert "default" in its
            assert "other" not in its
        with pytest.raises(pytest.fail.Exception, match="a factor was computed"):
            factors["default"]


@pytest.mark.parametrize("base", ["llama", "gpt2", "bert"])
def test_merged_is_adapted_and_unmerged_is_the_base(config_of: Any, base: str) -> None:
    tiny = MODELS[base]
    model = get_peft_model(tiny.model(), config_of(target_modules=tiny.targets)).eval()
    randomise(model)
    batch = tiny.batch()
    expected = logits(model, batch)
    with model.disable_adapter():
        plain = logits(model, batch)
    assert not close(expected, plain, 1e-3)
    model.merge_adapter(safe_merge=True)
    assert close(logits(model, batch), expected)
    model.unmerge_adapter()
    assert close(logits(model, batch), expected)
    with model.disable_adapter():
        assert close(logits(model, batch), plain)
    assert close(logits(model.merge_and_unload(), batch), expected)


def test_a_half_precision_base_trains_in_float32(config_of: Any) -> None:
    model = get_peft_model(LLAMA.model(dtype=torch.bfloat16), config_of(target_modules=TARGETS))
    assert {its.dtype for its in model.parameters() if its.requires_grad} == {torch.float32}
    randomise(model)
    found: Tensor = logits(model, BATCH)
    assert found.dtype == torch.bfloat16
    expected = logits(adapted(config_of))
    assert torch.allclose(found.float(), expected, atol=0.05)


def test_on_a_half_precision_base_only_the_active_adapter_trains(
    config_of: Any, tmp_path: Path
) -> None:
    def base() -> Any:
        return LLAMA.model(dtype=torch.bfloat16)

    model = get_peft_model(base(), config_of(target_modules=TARGETS))
    model.add_adapter("second", config_of(target_modules=TARGETS))
    trains = {name for name, its in model.named_parameters() if its.requires_grad}
    assert trains
    assert all(".default." in name for name in trains)
    model.save_pretrained(tmp_path)
    assert trainable(peft.PeftModel.from_pretrained(base(), tmp_path)) == 0


def test_a_file_that_lacks_a_tensor_is_refused(config_of: Any, tmp_path: Path) -> None:
    adapted(config_of).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, file)
    if msplora._peft.GOES_BY_NAMES:
        with pytest.warns(UserWarning, match="missing adapter keys"):
            peft.PeftModel.from_pretrained(LLAMA.model(), tmp_path)
        return
    with pytest.raises(MSPLoraError, match="is missing"):
        peft.PeftModel.from_pretrained(LLAMA.model(), tmp_path)


def test_what_it_cannot_do_is_refused(config_of: Any) -> None:
    with pytest.raises(UnsupportedError, match="embed_tokens"):
        get_peft_model(LLAMA.model(), config_of(target_modules=["embed_tokens"]))
    with pytest.raises(UnsupportedError, match="use_rslora"):
        config_of(use_rslora=True)
    model = adapted(config_of)
    with pytest.raises(UnsupportedError, match="adapter_names"):
        model(**BATCH, adapter_names=["default", "__base__"])
    with pytest.raises(UnsupportedError, match="added up"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    for other in CONFIGS.values():
        if other is not config_of:
            with pytest.raises(
                UnsupportedError, match=f"carries an adapter of {model.base_model._method}"
            ):
                peft.inject_adapter_in_model(
                    other(target_modules=TARGETS), model.base_model.model, "second"
                )
    with pytest.raises(ConfigError, match="Choose another name"):
        get_peft_model(LLAMA.model(), config_of(target_modules=TARGETS), adapter_name="a.b")


def test_importing_the_sisters_is_quick_and_asked_for() -> None:
    code = """
import sys, msplora
assert "msplora.sisters" not in sys.modules
import msplora.sisters
assert not {"torch", "peft"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_reading_a_config_registers_the_sisters(tmp_path: Path) -> None:
    """Also where PEFT and msplora came first, and no import follows that could."""
    HydraConfig().save_pretrained(str(tmp_path))
    code = f"""
import peft, msplora, pathlib
from msplora.loading import read_config
assert type(read_config(pathlib.Path({str(tmp_path)!r}))).__name__ == "HydraConfig"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "first",
    [
        "msplora.sisters",
        "msplora.loading",  # the command line's
    ],
)
def test_importing_the_sisters_before_peft_registers_them(first: str) -> None:
    code = f"""
import {first}, peft
for name in ("HYDRA", "ELALORA"):
    assert peft.PeftType(name) in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
"""
    subprocess.run([sys.executable, "-c", code], check=True)
