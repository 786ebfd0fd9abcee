"""What plug-ins for other trainers make of a LoRA's options.

The trainers themselves are run by benchmarks/plugins.py, each in an environment of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig

import msplora
from msplora.integrations.from_lora import pyramid_of

ASKED: dict[str, Any] = {
    "r": 12,
    "lora_alpha": 24,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"],
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "modules_to_save": ["lm_head"],
    "use_rslora": True,
    "task_type": "CAUSAL_LM",
}


def test_what_is_asked_of_a_lora_is_asked_of_the_pyramid() -> None:
    found = pyramid_of(LoraConfig(**ASKED))
    assert found.to_dict() == msplora.MSPLoraConfig(**ASKED).to_dict()
    assert pyramid_of(LoraConfig()).to_dict() == msplora.MSPLoraConfig(lora_alpha=8).to_dict()


def test_levels_stand_in_for_the_one_rank_and_alpha() -> None:
    found = pyramid_of(LoraConfig(**ASKED), ranks=[8, 2], groups=[1, 0], levels=None)
    assert (found.ranks, found.groups, found.alphas) == ([8, 2], [1, 0], [24, 24])
    found = pyramid_of(LoraConfig(**ASKED), alphas=[8, 4, 2])
    assert (found.ranks, found.alphas) == ([12, 6, 3], [8, 4, 2])
    found = pyramid_of(LoraConfig(**ASKED), split_alpha=True)
    assert found.alphas == [8, 8, 8]


def test_what_a_pyramid_cannot_do_is_refused() -> None:
    with pytest.raises(msplora.MSPLoraError, match="init_lora_weights"):
        pyramid_of(LoraConfig(init_lora_weights="pissa"))
    with pytest.raises(msplora.MSPLoraError, match="r must be at least 4"):
        pyramid_of(LoraConfig(r=2))
