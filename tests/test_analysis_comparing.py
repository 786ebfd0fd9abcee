"""Two adapters laid beside each other: what `msplora analyse` compares, and what it leaves out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

import msplora
from adapted_llama import adapted
from analysed import WEIGHTS, edit, save
from runs import msplora as command
from tiny import MODELS


@pytest.mark.parametrize("method", [LoraConfig, msplora.MSPLoraConfig])
def test_an_encoder_is_compared_with_an_encoder(method: Any, tmp_path: Path) -> None:
    """Kinds of two stacks may have one name and shape: beside itself an adapter is itself."""
    model: Any = get_peft_model(MODELS["t5"].model(), method(target_modules=["q", "v"], r=4))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    for name in ("one", "other"):
        save(model, tmp_path / name)
    found = msplora.analyse(tmp_path / "one/adapter", tmp_path / "other/adapter")
    assert len(found.comparisons[0].kinds) == len(found.adapters[0].kinds)
    for kind in found.comparisons[0].kinds:
        np.testing.assert_allclose([kind.cosine, kind.columns, kind.rows], 1, rtol=1e-6)


def test_layers_that_are_only_counted_are_not_laid_beside_numbered_ones(tmp_path: Path) -> None:
    """Without the base nothing tells which block a pyramid's file skips; a LoRA's names do."""
    from msplora.loading import write_json
    from msplora.plain_lora import lora_of

    model = adapted(exclude_modules=["model.layers.1.self_attn.q_proj"])
    folder = save(model, tmp_path, MODELS["llama"].model())
    tensors, config = lora_of(model)
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / WEIGHTS)
    write_json(tmp_path / "lora/adapter_config.json", config)
    for base, layers in ((None, {}), (str(tmp_path / "base"), {"q_proj": (0, 2, 3)})):
        found = msplora.analyse(folder, tmp_path / "lora", base=base, intruder_vectors=0)
        compared = {its.kind.rpartition(".")[2]: its for its in found.comparisons[0].kinds}
        assert {name: its.layers for name, its in compared.items()} == {
            **layers,
            "v_proj": (0, 1, 2, 3),
        }
        said = " ".join(found.comparisons[0].notes)
        assert ("1 kind(s) are not compared, such as self_attn.q_proj" in said) == (base is None)
        for its in compared.values():
            np.testing.assert_allclose([its.cosine, its.columns, its.rows], 1, rtol=1e-6)


def test_two_adapters_that_have_nothing_in_common(tmp_path: Path) -> None:
    query = save(adapted(target_modules=["q_proj"]), tmp_path / "query")
    value = save(adapted(target_modules=["v_proj"]), tmp_path / "value")
    found = msplora.analyse(query, value)
    assert [its.name for its in found.adapters] == ["query/adapter", "value/adapter"]
    assert found.comparisons[0].kinds == ()
    assert found.comparisons[0].notes == ("They adapt no weight of the same place and shape.",)


def test_what_is_left_out_of_a_comparison_is_said(tmp_path: Path) -> None:
    folders = []
    for name, layers in (("one", [0, 1]), ("other", [2, 3])):
        folders.append(save(adapted(layers_to_transform=layers), tmp_path / name))
        edit(folders[-1], base_model_name_or_path=str(tmp_path / name / "base"))
    found = msplora.analyse(*folders)
    (comparison,) = found.comparisons
    bases, blocks = comparison.notes
    assert "one/adapter names one/base, and other/adapter names other/base" in bases
    assert str(tmp_path) not in bases
    assert blocks.startswith("2 kind(s) are not compared, such as self_attn.q_proj")
    assert "in different blocks" in blocks
    page, out = found.to_html(), command("analyse", *folders).out
    for note in comparison.notes:
        assert note in page
        assert f"· {note}" in out


def test_kinds_and_layers_that_only_one_adapts_are_said(tmp_path: Path) -> None:
    one, other = (
        save(adapted(target_modules=its, layers_to_transform=layers), tmp_path / its[1])
        for its, layers in ((["q_proj", "v_proj"], [0, 1, 2]), (["q_proj", "k_proj"], [1, 2, 3]))
    )
    (comparison,) = msplora.analyse(one, other).comparisons
    (kind,) = comparison.kinds
    assert (kind.kind, kind.layers) == ("self_attn.q_proj", (1, 2))
    alone, layers = comparison.notes
    assert alone.startswith("2 kind(s) are not compared, such as self_attn.v_proj: only one")
    assert layers.startswith("1 kind(s) are compared in some layers, such as self_attn.q_proj")
    assert msplora.analyse(one, copy_of(one, tmp_path)).comparisons[0].notes == ()


def copy_of(adapter: Path, folder: Path) -> Path:
    return Path(shutil.copytree(adapter, folder / "copy"))
