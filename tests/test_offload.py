"""A base whose layers wait on the disk or stand on another device: adapters are brought there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

import msplora
from adapted_llama import BATCH, TARGETS, close, config, logits, step
from msplora.sisters import ElaLoraConfig, HydraConfig
from oracle import randomise
from test_sisters import randomise as randomise_all
from tiny import llama

LAYERS = 4
HERE = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.2": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}
AWAY = ("model.layers.1", "model.layers.3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    llama(LAYERS).save_pretrained(folder)
    return folder


@pytest.fixture
def offloaded(folder: Path, tmp_path: Path) -> Any:
    """Two layers of four on the disk: accelerate reads them when it is their turn."""
    places = HERE | dict.fromkeys(AWAY, "disk")
    model = hf.AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert model.model.layers[1].self_attn.q_proj.weight.device.type == "meta"
    return model


def whole(folder: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder)


def adapted(base: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(base, config())


def test_factors_are_in_memory_where_layers_are_on_the_disk(offloaded: Any) -> None:
    model = adapted(offloaded)
    places = {its.device.type for pair in msplora.factors(model).values() for its in pair[:2]}
    assert places == {"cpu"}


def test_training_is_that_of_the_base_in_memory(folder: Path, offloaded: Any) -> None:
    there, here = adapted(offloaded), adapted(whole(folder))
    for _ in range(3):
        step(there)
        step(here)
    for name, pair in msplora.factors(here).items():
        for found, expected in zip(msplora.factors(there)[name][:2], pair[:2], strict=True):
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-8)
    assert close(logits(there), logits(here))


def test_an_adapter_is_saved_and_loaded_over_layers_on_the_disk(
    folder: Path, offloaded: Any, tmp_path: Path
) -> None:
    """`PeftModel.from_pretrained` would move the base, and cannot: not with LoRA either."""
    trained = adapted(whole(folder))
    randomise(trained)
    trained.save_pretrained(tmp_path / "adapter")
    loaded = get_peft_model(offloaded, PeftConfig.from_pretrained(tmp_path / "adapter"))
    weights = load_peft_weights(str(tmp_path / "adapter"))
    assert not set_peft_model_state_dict(loaded, weights).unexpected_keys
    assert close(logits(loaded.eval()), logits(trained.eval()))
    loaded.save_pretrained(tmp_path / "again")
    first, again = (
        (tmp_path / its / "adapter_model.safetensors").read_bytes() for its in ("adapter", "again")
    )
    assert first == again


def test_merging_writes_into_the_layers_on_the_disk(folder: Path, offloaded: Any) -> None:
    model = adapted(offloaded)
    randomise(model)
    expected = logits(model.eval())
    assert not close(expected, logits(whole(folder)), 1e-2)
    assert close(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize("config_of", [HydraConfig, ElaLoraConfig])
def test_a_sister_trains_and_merges_over_layers_on_the_disk(
    folder: Path, offloaded: Any, config_of: Any
) -> None:
    def sister(base: Any) -> Any:
        model = get_peft_model(base, config_of(target_modules=TARGETS)).eval()
        randomise_all(model)
        return model

    there, here = sister(offloaded), sister(whole(folder))
    before = logits(here)
    assert close(logits(there), before)
    trained = {name: its for name, its in there.named_parameters() if its.requires_grad}
    assert {its.device.type for its in trained.values()} == {"cpu"}
    for _ in range(3):
        step(there)
        step(here)
    expected = dict(here.named_parameters())
    for name, its in trained.items():
        assert torch.allclose(its, expected[name], rtol=1e-5, atol=1e-8), name
    adapted = logits(here)
    assert not close(adapted, before, 1e-3)
    assert not close(adapted, logits(whole(folder)), 1e-2)
    assert close(logits(there), adapted)
    assert close(logits(there.merge_and_unload()), adapted)


@pytest.mark.parametrize("config_of", [HydraConfig, ElaLoraConfig])
def test_a_sister_is_loaded_over_layers_on_the_disk(
    folder: Path, offloaded: Any, tmp_path: Path, config_of: Any
) -> None:
    trained = get_peft_model(whole(folder), config_of(target_modules=TARGETS))
    randomise_all(trained)
    trained.save_pretrained(str(tmp_path / "adapter"))
    loaded = get_peft_model(offloaded, PeftConfig.from_pretrained(tmp_path / "adapter"))
    weights = load_peft_weights(str(tmp_path / "adapter"))
    for low in (False, True):
        set_peft_model_state_dict(loaded, weights, low_cpu_mem_usage=low)
        assert close(logits(loaded.eval()), logits(trained.eval()))


def test_a_shared_pair_follows_its_layers_to_another_device(folder: Path) -> None:
    """The meta device stands for a second GPU: shapes are computed there, and no numbers."""
    from accelerate import dispatch_model

    base = whole(folder)
    places = HERE | dict.fromkeys(AWAY, "cpu") | {"model.layers.3": "meta", "model.norm": "meta"}
    places |= {"lm_head": "meta", "model.rotary_emb": "cpu"}
    model = adapted(dispatch_model(base, places, main_device="cpu", force_hooks=True))
    seen: dict[int, Any] = {}
    for place, layer in enumerate(model.base_model.model.model.layers):
        layer.self_attn.v_proj.register_forward_hook(
            lambda module, args, output, place=place: seen.update({place: output})
        )
    with pytest.raises(NotImplementedError), torch.no_grad():
        model(**BATCH)  # accelerate brings the logits back to the first device, and there are none
    assert [its.device.type for its in seen.values()] == ["cpu", "cpu", "cpu", "meta"]
    assert {its.shape for its in seen.values()} == {seen[0].shape}
