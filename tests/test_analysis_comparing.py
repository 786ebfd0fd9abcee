"""Two adapters laid beside each other: what `msplora analyse` compares, and what it leaves out."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

import msplora
from adapted_llama import adapted
from analysed import WEIGHTS, edit, save
from runs import msplora as command
from test_analysis_lora import experts_are_parameters
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
    tensors, config = lora_of(model)  # it has zeros where the pyramid has nothing
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / WEIGHTS)
    write_json(tmp_path / "lora/adapter_config.json", config)
    (comparison,) = msplora.analyse(folder, tmp_path / "lora").comparisons
    assert comparison.kinds == ()
    assert comparison.notes[0].startswith("2 kind(s) are not compared, such as self_attn.q_proj")
    base = str(tmp_path / "base")
    layers = {"q_proj": (0, 2, 3), "v_proj": (0, 1, 2, 3)}
    compare_alike(folder, tmp_path / "lora", layers, base=base, intruder_vectors=0)


def test_the_hash_of_what_is_adapted_tells_that_layers_are_the_same(tmp_path: Path) -> None:
    """A LoRA has their numbers in its file, and both skip one."""
    asked = {"target_modules": ["q_proj", "embed_tokens"], "exclude_modules": r".*\.1\..*"}
    folder = save(adapted(**asked), tmp_path / "pyramid")
    lora = get_peft_model(MODELS["llama"].model(), LoraConfig(**asked))
    other = save(lora, tmp_path / "lora")
    for pair in ((folder, other), (other, folder)):
        (comparison,) = msplora.analyse(*pair).comparisons
        assert comparison.notes == ()
        assert {its.kind: its.layers for its in comparison.kinds} == {
            "self_attn.q_proj": (0, 2, 3),
            "model.embed_tokens": (None,),
        }


def compare_alike(
    one: Path, other: Path, layers: dict[str, tuple[int, ...]], **options: Any
) -> None:
    (comparison,) = msplora.analyse(one, other, **options).comparisons
    compared = {its.kind.rpartition(".")[2]: its for its in comparison.kinds}
    assert {name: its.layers for name, its in compared.items()} == layers
    for its in compared.values():
        np.testing.assert_allclose([its.cosine, its.columns, its.rows], 1, rtol=1e-6)


def test_adapters_of_other_blocks_are_not_taken_for_those_of_the_same(tmp_path: Path) -> None:
    """Their files are alike: the numbers of their blocks are not in them."""
    folders = {
        name: save(adapted(target_modules=rf".*layers\.[{blocks}]\..*q_proj"), tmp_path / name)
        for name, blocks in (("even", "02"), ("odd", "13"), ("again", "13"))
    }
    lora = LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 1])
    folders["lora"] = save(get_peft_model(MODELS["llama"].model(), lora), tmp_path / "lora")
    for other in ("odd", "lora"):
        (comparison,) = msplora.analyse(folders["even"], folders[other]).comparisons
        assert comparison.kinds == ()
        assert comparison.notes[0].endswith("may not be the same. Pass --base, which knows them.")
    compare_alike(folders["odd"], folders["again"], {"q_proj": (0, 1)})


def test_layers_are_the_same_where_both_adapt_all(tmp_path: Path) -> None:
    """Though one adapts more of them, so that the hashes of what they adapt differ."""
    one, other = (
        save(adapted(target_modules=its), tmp_path / its[0])
        for its in (["q_proj"], ["v_proj", "q_proj"])
    )
    (comparison,) = msplora.analyse(one, other).comparisons
    assert [(its.kind, its.layers) for its in comparison.kinds] == [
        ("self_attn.q_proj", (0, 1, 2, 3))
    ]


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


def test_convolutions_have_one_name_in_both(tmp_path: Path) -> None:
    """That of a place with weights of several shapes has the shape in it."""
    convolutions = (nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, groups=2))
    model = nn.Sequential(*map(nn.Sequential, convolutions))
    folders = [
        save(get_peft_model(deepcopy(model), method(target_modules=r"\d\.0", r=8)), tmp_path / name)
        for name, method in (("lora", LoraConfig), ("pyramid", msplora.MSPLoraConfig))
    ]
    (comparison,) = msplora.analyse(*folders).comparisons
    assert [its.kind for its in comparison.kinds] == ["0[16x8x3x3]", "0[2*16x16x3x3]", "0[8x8x3x3]"]
    assert comparison.notes == ()


@experts_are_parameters
def test_parameters_that_a_file_does_not_name_are_compared_with_the_base(tmp_path: Path) -> None:
    tiny = MODELS["mixtral"]
    asked = {"target_modules": ["q_proj"], "target_parameters": [*tiny.parameters]}
    tiny.model().save_pretrained(tmp_path / "base")
    folders = [
        save(get_peft_model(tiny.model(), method(**asked)), tmp_path / name)
        for name, method in (("lora", LoraConfig), ("pyramid", msplora.MSPLoraConfig))
    ]
    (alone,) = msplora.analyse(*folders).comparisons
    assert [its.kind for its in alone.kinds] == ["self_attn.q_proj"]
    (note,) = alone.notes
    assert note.startswith("8 kind(s) are not compared, such as mlp.experts")
    assert "which of a module's parameters they are. Pass --base" in note
    base = tmp_path / "base"
    (known,) = msplora.analyse(*folders, base=base, intruder_vectors=0).comparisons
    assert (len(known.kinds), known.notes) == (9, ())


def copy_of(adapter: Path, folder: Path) -> Path:
    return Path(shutil.copytree(adapter, folder / "copy"))
