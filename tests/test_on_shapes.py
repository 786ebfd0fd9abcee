"""A plain LoRA is made without the base's weights, where nothing is proved on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

import msplora
from msplora.errors import BaseModelError, MSPLoraError
from oracle import randomise
from tiny import MODELS, llama


def _saved(folder: Path, name: str, **options: Any) -> Path:
    """A base in `folder / "base"`, and an adapter of it whose pairs all act."""
    tiny = MODELS[name]
    base: Any = tiny.model()
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    targets = {"target_modules": tiny.targets, "target_parameters": list(tiny.parameters) or None}
    config = msplora.MSPLoraConfig(**targets | options)
    adapted = get_peft_model(base, config)
    randomise(adapted)
    adapted.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def _without_its_weights(folder: Path) -> None:
    for file in (folder / "base").glob("*.safetensors"):
        file.unlink()


def _same_files(one: Path, other: Path) -> None:
    found, expected = (load_file(its / "adapter_model.safetensors") for its in (one, other))
    assert found.keys() == expected.keys()
    assert all(torch.equal(its, expected[name]) for name, its in found.items())
    configs = [json.loads((its / "adapter_config.json").read_text()) for its in (one, other)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_lora_is_that_of_the_loaded_base(name: str, tmp_path: Path) -> None:
    adapter = _saved(tmp_path, name)
    try:
        msplora.to_lora(adapter, tmp_path / "proved")
    except MSPLoraError as error:  # no inputs, or nothing that PEFT's LoRA could be
        pytest.skip(str(error))
    _without_its_weights(tmp_path)
    msplora.to_lora(adapter, tmp_path / "lora", verify=False)
    _same_files(tmp_path / "lora", tmp_path / "proved")


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "msplora_only", "trainable_token_indices": [1, 3]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_what_is_trained_besides_is_of_the_file(options: dict[str, Any], tmp_path: Path) -> None:
    adapter = _saved(
        tmp_path,
        "llama",
        bias="msplora_only",
        trainable_token_indices=[1, 3],
        task_type="CAUSAL_LM",
    )
    msplora.to_lora(adapter, tmp_path / "proved")
    _without_its_weights(tmp_path)
    msplora.to_lora(adapter, tmp_path / "lora", verify=False)
    _same_files(tmp_path / "lora", tmp_path / "proved")


def test_a_head_of_other_classes_is_of_the_file(tmp_path: Path) -> None:
    llama(layers=2).save_pretrained(tmp_path / "base")
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    model.config.pad_token_id = 0
    config = msplora.MSPLoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    adapted = get_peft_model(model, config)
    randomise(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    msplora.to_lora(tmp_path / "adapter", tmp_path / "proved")
    _without_its_weights(tmp_path)
    msplora.to_lora(tmp_path / "adapter", tmp_path / "lora", verify=False)
    _same_files(tmp_path / "lora", tmp_path / "proved")


@pytest.mark.parametrize("options", [{"use_dora": True}, {"target_modules": ["q_proj", "lm_head"]}])
def test_where_the_weights_have_a_say_they_are_loaded(
    options: dict[str, Any], tmp_path: Path
) -> None:
    adapter = _saved(tmp_path, "llama", task_type="CAUSAL_LM", **options)
    msplora.to_lora(adapter, tmp_path / "proved")
    msplora.to_lora(adapter, tmp_path / "lora", verify=False)
    _same_files(tmp_path / "lora", tmp_path / "proved")
    _without_its_weights(tmp_path)
    with pytest.raises(BaseModelError, match="cannot load the model"):
        msplora.to_lora(adapter, tmp_path / "again", verify=False)
