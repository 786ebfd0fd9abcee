"""What `msplora inspect` finds suspicious: each rule finds what it is for, and nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import msplora
from adapted_llama import adapted
from inspected import WEIGHTS, edit, lora, scaled, set_config, the
from msplora.loading import check_finite
from runs import msplora as command
from tiny import MODELS, llama


def test_an_untrained_adapter_has_no_effect(tmp_path: Path) -> None:
    adapted(random=False).save_pretrained(tmp_path)
    finding = the(msplora.inspect(tmp_path), "no effect")
    assert finding.severity == "problem"
    assert len(finding.where) == 16


def test_pairs_that_learned_nothing(pyramid: Path) -> None:
    def no_mid(tensors: Any) -> Any:
        return {k: its * ("mid/" not in k or "msplora_A" in k) for k, its in tensors.items()}

    edit(pyramid, no_mid)
    found = msplora.inspect(pyramid)
    assert the(found, "zero B").severity == "warning"
    assert len(the(found, "zero B").where) == 6
    assert found.levels[1].norm == 0
    assert {pair.zero for pair in found.pairs if pair.level == "mid"} == {("B",)}


def test_a_product_of_zero(pyramid: Path) -> None:
    edit(pyramid, lambda its: {k: t * ("mid/1" not in k or "_B" in k) for k, t in its.items()})
    assert len(the(msplora.inspect(pyramid), "zero product").where) == 2


def test_a_scale_of_zero_is_named(tmp_path: Path) -> None:
    folder = lora(tmp_path, alpha_pattern={"v_proj": 0})
    finding = the(msplora.inspect(folder), "zero product")
    assert len(finding.where) == 4
    assert "The scale is 0 in 4 of 8 pairs" in finding.text
    set_config(folder, lora_alpha=0)
    assert "scale of all 8 pairs is 0" in the(msplora.inspect(folder), "no effect").text


def test_norms_that_exploded(pyramid: Path) -> None:
    part = "local/2/self_attn/q_proj/pair.msplora_B"
    edit(pyramid, lambda its: {key: t * (30 if part in key else 1) for key, t in its.items()})
    finding = the(msplora.inspect(pyramid), "exploded norm")
    assert finding.where == ("local/2/self_attn.q_proj",)
    assert "times an identity's" in finding.text
    # Far above its level's others, and still small.
    edit(pyramid, lambda its: {k: t * (0.01 if "_B" in k else 1) for k, t in its.items()})
    finding = the(msplora.inspect(pyramid), "exploded norm")
    assert finding.where == ("local/2/self_attn.q_proj",)
    assert "times the median of level local" in finding.text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite(value: float, pyramid: Path) -> None:
    name = next(key for key in load_file(pyramid / WEIGHTS) if "mid/1/self_attn/v_proj" in key)

    def spoil(tensors: Any) -> Any:
        tensors[name][0, 0] = value
        return tensors

    edit(pyramid, spoil)
    found = msplora.inspect(pyramid)
    assert the(found, "not finite").where == (name,)
    (pair,) = [its for its in found.pairs if its.address == "mid/1/self_attn.v_proj"]
    assert pair.norm is None
    json.loads(found.to_json())


@pytest.mark.parametrize(
    ("part", "count", "said"),
    [
        (".mid/", 6, "of the level(s) mid"),
        ("local/1/self_attn/q_proj/pair.msplora_B", 1, "of the level(s) local"),
        (".local/", 2, "of the level(s) local"),
        ("pyramid_store", 0, "no low-rank pair"),
    ],
)
def test_a_file_that_misses_pairs(part: str, count: int, said: str, pyramid: Path) -> None:
    head = {"classifier.weight": torch.ones(2, 2)}
    edit(pyramid, lambda its: head | {key: t for key, t in its.items() if part not in key})
    finding = the(msplora.inspect(pyramid), "missing pair")
    assert said in finding.text
    assert len(finding.where) == count


def test_a_lost_last_layer_shows_as_kinds_of_unequal_depth(pyramid: Path) -> None:
    lost = "local/3/self_attn/q_proj"
    edit(pyramid, lambda its: {key: t for key, t in its.items() if lost not in key})
    notes = [its.text for its in msplora.inspect(pyramid).findings]
    assert any("self_attn.q_proj 3, self_attn.v_proj 4" in its for its in notes)
    assert "Nothing suspicious" not in command("inspect", pyramid).out


def test_a_file_that_misses_whole_targets_or_layers(pyramid: Path, tmp_path: Path) -> None:
    edit(pyramid, lambda its: {k: t for k, t in its.items() if "q_proj" not in k})
    assert the(msplora.inspect(pyramid), "missing target").where == ("q_proj",)
    scaled(adapted(layers_to_transform=[0, 1, 2, 3])).save_pretrained(tmp_path / "listed")
    assert not msplora.inspect(tmp_path / "listed").suspicious
    edit(tmp_path / "listed", lambda its: {k: t for k, t in its.items() if "local/3/" not in k})
    assert "lists 4 block(s)" in the(msplora.inspect(tmp_path / "listed"), "missing layer").text
    plain = lora(tmp_path / "lora")
    assert not msplora.inspect(plain).suspicious
    whole = load_file(plain / WEIGHTS)
    edit(plain, lambda its: {k: t for k, t in its.items() if "layers.2." not in k})
    assert "lacks block 2" in the(msplora.inspect(plain), "missing layer").text
    edit(plain, lambda _: {k: t for k, t in whole.items() if "v_proj" not in k})
    assert the(msplora.inspect(plain), "missing target").where == ("v_proj",)


def test_pairs_that_no_layer_borrows(pyramid: Path) -> None:
    def one_more(tensors: Any) -> Any:
        more = {k.replace("mid/2", "mid/7"): t.clone() for k, t in tensors.items() if "mid/2" in k}
        return tensors | more

    edit(pyramid, one_more)
    found = msplora.inspect(pyramid)
    assert the(found, "unused pair").where == ("mid/7/self_attn.q_proj", "mid/7/self_attn.v_proj")
    assert len(found.pairs) == 16


def test_factors_that_do_not_fit(pyramid: Path, tmp_path: Path) -> None:
    part, whole = "global/0/self_attn/q_proj/pair.msplora_A", load_file(pyramid / WEIGHTS)
    edit(pyramid, lambda its: {key: t[:5] if part in key else t for key, t in its.items()})
    finding = the(msplora.inspect(pyramid), "misshapen")
    assert finding.where == ("global/0/self_attn.q_proj",)
    assert "A (5, 32) and B (32, 8), where its rank is 8" in finding.text
    narrow = "mid/1/self_attn/q_proj/pair.msplora_A"
    edit(pyramid, lambda _: {k: t[:, :-1] if narrow in k else t for k, t in whole.items()})
    finding = the(msplora.inspect(pyramid), "misshapen")
    assert finding.where == ("mid/1/self_attn.q_proj",)
    assert "A (4, 31) and B (32, 4), which is of another width than global/0" in finding.text
    plain = lora(tmp_path / "lora")
    lost = "1.self_attn.v_proj.lora_B"
    edit(plain, lambda its: {key: t[:, :1] if lost in key else t for key, t in its.items()})
    assert the(msplora.inspect(plain), "misshapen").where == ("model.layers.1.self_attn.v_proj",)
    edit(plain, lambda its: {key: t for key, t in its.items() if lost not in key})
    assert the(msplora.inspect(plain), "missing pair").where == ("model.layers.1.self_attn.v_proj",)


@pytest.mark.parametrize("is_pyramid", [True, False])
def test_factors_of_unusual_types(is_pyramid: bool, pyramid: Path, tmp_path: Path) -> None:
    folder = pyramid if is_pyramid else lora(tmp_path / "lora")
    whole = load_file(folder / WEIGHTS)
    first = next(iter(whole))
    edit(folder, lambda its: its | {first: torch.tensor(1.0)})
    assert the(msplora.inspect(folder), "misshapen").where
    small = {key: its.to(torch.float8_e4m3fn) for key, its in whole.items()}
    edit(folder, lambda _: small)
    found = msplora.inspect(folder)
    assert not found.suspicious
    edit(folder, lambda _: {key: its.float() for key, its in small.items()})
    assert found.pairs == msplora.inspect(folder).pairs
    check_finite(small, "the file")
    edit(folder, lambda _: {key: its.double() * 1e160 for key, its in whole.items()})
    found = msplora.inspect(folder)
    assert len(the(found, "exploded norm").where) == len(found.pairs)
    assert {pair.norm for pair in found.pairs} == {math.inf}
    assert json.loads(found.to_json())["pairs"][0]["norm"] is None
    assert command("inspect", folder).code == 0


def test_a_group_of_a_huge_number_is_left_over(pyramid: Path) -> None:
    huge = f"local/{10**12}"
    edit(pyramid, lambda its: {k.replace("local/3", huge): t for k, t in its.items()})
    finding = the(msplora.inspect(pyramid), "unused pair")
    assert finding.where[0] == f"{huge}/self_attn.q_proj"


def test_without_a_level_per_layer_the_layers_are_not_known(tmp_path: Path) -> None:
    scaled(adapted(ranks=[4, 2], groups=[1, 2])).save_pretrained(tmp_path)
    found = msplora.inspect(tmp_path)
    assert not found.suspicious
    assert found.kinds[0].layers is None
    assert {pair.layers for pair in found.pairs} == {()}
    assert "?" in command("inspect", tmp_path).out


@pytest.mark.slow
def test_what_else_a_reader_should_know(tmp_path: Path) -> None:
    model: Any = get_peft_model(
        MODELS["bert"].model(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    )
    randomise_lora(model)
    model.save_pretrained(tmp_path / "head")
    found = msplora.inspect(tmp_path / "head")
    assert not found.suspicious
    assert any("2 more tensor(s)" in its.text for its in found.findings)
    assert found.other_parameters == 3 * 32 + 3
    dora = lora(tmp_path / "dora", use_dora=True)
    found = msplora.inspect(dora)
    assert [its.text for its in found.findings if "DoRA" in its.text]
    assert not any("more tensor(s)" in its.text for its in found.findings)
    gone = str(tmp_path / "gone")
    set_config(dora, base_model_name_or_path=gone, init_lora_weights="pissa")
    assert "there is no such folder" in the(msplora.inspect(dora), "base not found").text
    assert any("init_lora_weights='pissa'" in its.text for its in msplora.inspect(dora).findings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_qalora": True}, "QALoRA, which pools a layer's inputs before A reads them: its"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA, whose A or B is stored as the blocks"),
        ({"alora_invocation_tokens": [5, 6]}, "acts from these tokens on"),
    ],
)
def test_what_is_no_product_alone_is_noted(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = lora(tmp_path)
    set_config(folder, task_type="CAUSAL_LM", **changes)
    found = msplora.inspect(folder)
    assert not found.suspicious
    assert any(said in its.text for its in found.findings)


def test_a_bias_beside_the_product_is_noted_once(tmp_path: Path) -> None:
    changes = {"target_modules": ["c_attn"], "lora_bias": True}
    found = msplora.inspect(lora(tmp_path, MODELS["gpt2"].model(), **changes))
    (said,) = [its.text for its in found.findings if "bias" in its.text]
    assert "a bias beside s·BA in 4 weight(s) (lora_bias)" in said


def randomise_lora(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)


def test_patterns_that_only_the_base_tells_apart(tmp_path: Path) -> None:
    pattern = {"model.layers.*.q_proj": 4}
    adapted(alpha_pattern=pattern).save_pretrained(tmp_path)
    found = msplora.inspect(tmp_path)
    assert any("ranks and scales are taken to be" in its.text for its in found.findings)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "model")  # pyright: ignore
    return tmp_path / "model"


def edit_model(folder: Path, change: Any) -> None:
    tensors = {key: its.clone() for key, its in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_model_that_was_not_merged(model_folder: Path) -> None:
    model: Any = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    model.get_base_model().save_pretrained(model_folder)
    finding = the(msplora.inspect(model_folder), "unmerged")
    assert "merge_and_unload" in finding.text


def test_weights_of_a_model_that_are_not_right(model_folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_model(model_folder, lambda its: its[name].mul_(30).numpy() is None)
    assert the(msplora.inspect(model_folder), "exploded weight").where == (name,)
    edit_model(model_folder, lambda its: its[name].zero_().numpy() is None)
    assert the(msplora.inspect(model_folder), "zero weight").where == (name,)
    edit_model(model_folder, lambda its: its[name].fill_(math.nan).numpy() is None)
    assert the(msplora.inspect(model_folder), "not finite").where == (name,)


def test_a_model_of_several_files_of_which_one_is_missing(model_folder: Path) -> None:
    llama().save_pretrained(model_folder, max_shard_size="50KB")  # pyright: ignore
    (model_folder / "model.safetensors").unlink()
    assert msplora.inspect(model_folder).findings == ()
    file = sorted(model_folder.glob("model-*.safetensors"))[1]
    file.unlink()
    assert the(msplora.inspect(model_folder), "missing tensor").where == (file.name,)


def test_parts_of_a_model_without_their_index(tmp_path: Path) -> None:
    """Which transformers does not load, whether there is one for each number or not."""
    hf_model: Any = MODELS["llama"].model()
    hf_model.save_pretrained(tmp_path, max_shard_size="20KB")
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 2
    assert not msplora.inspect(tmp_path).findings
    index = tmp_path / "model.safetensors.index.json"
    index.unlink()
    assert the(msplora.inspect(tmp_path), "missing tensor").where == (index.name,)
    parts[1].unlink()
    found = the(msplora.inspect(tmp_path), "missing tensor")
    assert found.where == (index.name, parts[1].name)
    assert f"A model in {len(parts)} parts lacks" in found.text
    hf_model.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole/model.safetensors").rename(tmp_path / "model.safetensors")
    # What is loaded is the one that is whole.
    assert set(the(msplora.inspect(tmp_path), "other weights").where) == {
        its.name for its in tmp_path.glob("model-*")
    }


@pytest.mark.parametrize("last", ["whole", "parts"])
def test_another_saving_into_the_same_folder(last: str, tmp_path: Path) -> None:
    """Transformers reads the one file, whatever is saved last and whatever an index says."""
    hf_model: Any = MODELS["llama"].model()
    savings = {"parts": {"max_shard_size": "20KB"}, "whole": {}}
    for name in sorted(savings, key=lambda its: its == last):
        hf_model.save_pretrained(tmp_path, **savings[name])
    found = msplora.inspect(tmp_path)
    assert list(found.files) == ["model.safetensors"]
    finding = the(found, "other weights")
    assert "model.safetensors.index.json" in finding.where
    assert any(its.startswith("model-0") for its in finding.where) == (last == "parts")


def test_an_index_of_the_one_file_is_no_other_model(tmp_path: Path) -> None:
    """As mlx-lm writes it."""
    hf_model: Any = MODELS["llama"].model()
    hf_model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert not msplora.inspect(tmp_path).findings
    index.write_text("{}")  # one that nothing can be made of
    assert the(msplora.inspect(tmp_path), "other weights").where == (index.name,)
