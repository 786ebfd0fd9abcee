"""Hot swapping: the saved adapter's answers, by the loaded adapter's parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import msplora
from adapted_llama import take_the_installed_peft
from msplora.errors import AdapterFileError, MSPLoraError, UnsupportedError
from oracle import randomise, same_tensors, tensors_of
from tiny import MODELS

LLAMA = MODELS["llama"]
TARGETS = ["q_proj", "v_proj"]


def adapted(seed: int, **changes: Any) -> Any:
    config = msplora.MSPLoraConfig(**({"target_modules": TARGETS} | changes))
    model = get_peft_model(LLAMA.model(), config).eval()
    randomise(model, seed=seed)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**LLAMA.batch()).logits


def saved(folder: Path, seed: int = 2, **changes: Any) -> tuple[Path, Tensor]:
    """A saved adapter, and the logits it gives."""
    model = adapted(seed, **changes)
    model.save_pretrained(folder)
    return folder, logits(model)


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_the_answers_are_the_saved_adapters_and_the_parameters_the_loaded_ones(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder, expected = saved(tmp_path, **changes)
    model = adapted(1, **changes)
    parameters = {name: id(its) for name, its in model.named_parameters()}
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    msplora.hotswap(model, folder)
    assert torch.equal(logits(model), expected)
    assert {name: id(its) for name, its in model.named_parameters()} == parameters
    model.save_pretrained(tmp_path / "again")
    reloaded = PeftModel.from_pretrained(LLAMA.model(), str(tmp_path / "again")).eval()
    assert torch.equal(logits(reloaded), expected)


def test_other_alphas_go_into_b(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path, alphas=[4, 48, 1], lora_alpha=4)
    model = adapted(1)
    scales = [scale for _, _, scale in msplora.factors(model).values()]
    msplora.hotswap(model, folder)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert [scale for _, _, scale in msplora.factors(model).values()] == scales


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_injected_adapter_is_swapped(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Its tensors have no "base_model.model." before their names; those of a file have."""
    other = adapted(2, **changes)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    other.save_pretrained(tmp_path)
    config = msplora.MSPLoraConfig(**({"target_modules": TARGETS} | changes))
    model: Any = inject_adapter_in_model(config, LLAMA.model()).eval()
    randomise(model, seed=1)
    parameters = {name: id(its) for name, its in model.named_parameters()}
    assert not torch.allclose(logits(model), logits(other), atol=1e-3)
    msplora.hotswap(model, tmp_path)
    assert torch.equal(logits(model), logits(other))
    assert {name: id(its) for name, its in model.named_parameters()} == parameters


def test_an_adapter_that_transformers_loaded_is_swapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_the_installed_peft(monkeypatch)
    first, before = saved(tmp_path / "first", seed=1)
    folder, expected = saved(tmp_path / "second", alphas=[4, 48, 1], lora_alpha=4)
    model: Any = LLAMA.model()
    model.load_adapter(str(first), "own")
    assert torch.equal(logits(model.eval()), before)
    msplora.hotswap(model, folder, "own")
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_one_of_two_adapters_is_swapped(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path)
    model = adapted(1)
    first = tensors_of(model)
    model.add_adapter("second", msplora.MSPLoraConfig(target_modules=TARGETS))
    msplora.hotswap(model, folder, "second")
    assert same_tensors(tensors_of(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_again(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path)
    model = adapted(1)
    compilations = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    logits(compiled)
    first = compilations
    msplora.hotswap(model, folder)
    assert torch.allclose(logits(compiled), expected, atol=1e-6)
    assert compilations == first > 0
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 4},
        {"ranks": [8, 4, 2], "groups": [1, 2, 0]},
        {"target_modules": ["q_proj"]},
        {"layers_to_transform": [0, 1]},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_an_adapter_that_is_not_alike_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder, _ = saved(tmp_path, **changes)
    model = adapted(1)
    before, expected = tensors_of(model), logits(model)
    with pytest.raises(AdapterFileError, match="load_adapter"):
        msplora.hotswap(model, folder)
    assert same_tensors(tensors_of(model), before)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("of", ["q_proj", "lm_head"])
@pytest.mark.parametrize("damage", ["missing", "has shape", "not finite"])
def test_a_damaged_file_changes_nothing(tmp_path: Path, of: str, damage: str) -> None:
    """Of a pair or of the head: PEFT copies the head first, and finds out later."""
    folder, _ = saved(tmp_path, modules_to_save=["lm_head"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    harmed = next(key for key in tensors if of in key)
    whole = tensors.pop(harmed)
    if damage != "missing":
        tensors[harmed] = whole[:1].clone() if damage == "has shape" else whole / 0
    save_file(tensors, file)
    model = adapted(1, modules_to_save=["lm_head"])
    before = tensors_of(model)
    with pytest.raises(AdapterFileError, match=damage):
        msplora.hotswap(model, folder)
    assert same_tensors(tensors_of(model), before)


def test_what_cannot_be_swapped_says_why(tmp_path: Path) -> None:
    model = adapted(1)
    get_peft_model(LLAMA.model(), LoraConfig(target_modules=TARGETS)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="not MSPLoRA"):
        msplora.hotswap(model, tmp_path)
    folder, _ = saved(tmp_path / "ours")
    with pytest.raises(MSPLoraError, match="no MSPLoRA adapter 'other'"):
        msplora.hotswap(model, folder, "other")
    model.merge_adapter()
    with pytest.raises(UnsupportedError, match="unmerge_adapter"):
        msplora.hotswap(model, folder)
    with pytest.raises(AdapterFileError, match="no folder"):
        msplora.hotswap(model, tmp_path / "nowhere")


def test_an_adapter_of_another_kind_of_base_is_refused(tmp_path: Path) -> None:
    """As on loading: Mistral's layers have the shapes of Llama's."""
    folder, _ = saved(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    model = adapted(1)
    before = tensors_of(model)
    with pytest.raises(AdapterFileError, match="type 'mistral', and this one is 'llama'"):
        msplora.hotswap(model, folder)
    assert same_tensors(tensors_of(model), before)


def test_a_level_whose_name_ends_anothers_is_scaled_once(tmp_path: Path) -> None:
    levels: dict[str, Any] = {"ranks": [4, 2], "groups": [1, 0], "levels": ["all", "not_all"]}
    folder, expected = saved(tmp_path, alphas=[32, 2], **levels)
    model = adapted(1, alphas=[4, 2], **levels)
    msplora.hotswap(model, folder)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("more", [0, 8])
def test_embeddings_in_the_file_do_not_take_the_place_of_the_bases(
    tmp_path: Path, more: int
) -> None:
    """Of the same size PEFT would copy them into the base, and of another stop half way."""
    other = adapted(2)
    if more:
        other.resize_token_embeddings(LLAMA.model().config.vocab_size + more)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1)
    other.save_pretrained(tmp_path, save_embedding_layers=True)
    model = adapted(1)
    before = tensors_of(model)
    with pytest.raises(AdapterFileError, match=r"embed_tokens.* the place of the base's own"):
        msplora.hotswap(model, tmp_path)
    assert same_tensors(tensors_of(model), before)


def test_the_bases_own_embeddings_may_stand_in_the_file(tmp_path: Path) -> None:
    other = adapted(2)
    other.save_pretrained(tmp_path, save_embedding_layers=True)
    model = adapted(1)
    msplora.hotswap(model, tmp_path)
    assert torch.equal(logits(model), logits(other))
