"""What `msplora doctor` knows of right bases: resized, of a revision, with names of old."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertModel, LlamaForCausalLM

import msplora
from analysed import edit as set_config
from analysed import refused
from examined import WEIGHTS, edit, save, save_lora, scale_b, statuses
from msplora.errors import AdapterFileError
from msplora.loading import BaseOptions
from tiny import EXPERTS_ARE_PARAMETERS, MODELS, VOCABULARY, llama

MODEL = "model.safetensors"
BASE, LOADED = "made for this base", "all of it is loaded"
conversions = pytest.mark.skipif(
    not EXPERTS_ARE_PARAMETERS, reason="transformers 4 has the names that 5 translates"
)


@pytest.mark.parametrize("method", [LoraConfig, msplora.MSPLoraConfig])
def test_a_base_is_given_the_embeddings_that_the_adapter_brings(
    method: Any, tmp_path: Path
) -> None:
    llama(2).save_pretrained(tmp_path / "base")  # pyright: ignore
    model: Any = LlamaForCausalLM.from_pretrained(str(tmp_path / "base"))
    model.resize_token_embeddings(70)
    config = method(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    scale_b(get_peft_model(model, config), 0.1).save_pretrained(str(tmp_path / "adapter"))
    found = msplora.doctor(str(tmp_path / "base"), tmp_path / "adapter")
    assert found.ok, statuses(found)
    assert found[BASE].status == "passed"
    assert f"embeddings of 70 tokens, and the base has {VOCABULARY}" in found[BASE].said
    assert found[BASE].figures["rows"] == 70


@pytest.mark.parametrize(
    ("tied", "changes", "saved", "status"),
    [
        (False, {"modules_to_save": ["embed_tokens"]}, False, "failed"),
        (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False, "passed"),
        (False, {"trainable_token_indices": [64, 69]}, True, "passed"),
    ],
)
def test_rows_that_are_made_up_are_missed(
    tied: bool, changes: dict[str, Any], saved: bool, status: str, tmp_path: Path
) -> None:
    """The head of a base whose embeddings an adapter alone brings, and more of them."""
    llama(2, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")  # pyright: ignore
    model: Any = LlamaForCausalLM.from_pretrained(str(tmp_path / "base"))
    model.resize_token_embeddings(70)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **changes,
    )
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=saved)
    found = msplora.doctor(str(tmp_path / "base"), tmp_path / "adapter")
    assert found[BASE].status == status, found[BASE].said
    if status == "failed":
        assert (
            "embeddings of 70 tokens, more than the base has, and not lm_head" in found[BASE].said
        )
        assert "save_embedding_layers=True" in found[BASE].advice


def test_names_that_carry_the_adapters(tmp_path: Path) -> None:
    """As `model.state_dict()` has them: PEFT loads these too, or some releases do."""
    base, adapter = save_lora(tmp_path)
    edit(adapter, lambda its: {k.replace(".weight", ".default.weight"): t for k, t in its.items()})
    inspected = msplora.inspect(adapter)
    assert not inspected.suspicious
    assert len(inspected.pairs) == 8
    assert any("named as in a model's state dict" in its.text for its in inspected.findings)
    assert msplora.analyse(adapter).adapters[0].levels
    state = PeftModel.from_pretrained(MODELS["llama"].model(), str(adapter)).state_dict()
    stored = load_file(adapter / WEIGHTS)
    is_loaded = all(torch.equal(state[name], its) for name, its in stored.items())
    status = msplora.doctor(base, adapter)[LOADED].status
    assert status == ("passed" if is_loaded else "failed")


def test_tokens_that_the_base_does_not_have(tmp_path: Path) -> None:
    base, _ = save_lora(tmp_path)
    model: Any = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(70)
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[69])
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    check = msplora.doctor(base, tmp_path / "adapter")[BASE]
    assert check.status == "failed"
    assert "trains tokens that the base does not have: index 69" in check.said
    with pytest.raises(AdapterFileError, match=r"does not fit LlamaForCausalLM .*index 69"):
        msplora.to_merged(tmp_path / "adapter", tmp_path / "merged", base=base)


@pytest.mark.filterwarnings("ignore::msplora.random_weights.RandomPoolerWarning")
def test_a_pooler_that_nothing_reads_is_not_missed(tmp_path: Path) -> None:
    MODELS["bert"].model().bert.save_pretrained(tmp_path / "base")
    edit(tmp_path / "base", lambda its: {k: t for k, t in its.items() if "pooler" not in k}, MODEL)
    model = BertModel.from_pretrained(str(tmp_path / "base"))
    config = LoraConfig(target_modules=["query"], init_lora_weights=False)
    config.task_type = "FEATURE_EXTRACTION"
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    found = msplora.doctor(str(tmp_path / "base"), tmp_path / "adapter")
    assert found.ok, statuses(found)
    assert found[BASE].status == "passed"
    assert "read last_hidden_state, and not pooler_output" in found[BASE].said


def test_a_tokenizer_with_its_own_code_is_not_run(tmp_path: Path) -> None:
    base, adapter = save_lora(tmp_path)
    set_config(adapter, base_model_name_or_path=base)
    (adapter / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}})
    )
    (adapter / "mine.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class Mine:\n"
        "    @classmethod\n"
        "    def from_pretrained(cls, *_, **__):\n"
        f"        return range({VOCABULARY - 4})\n"
        "    @classmethod\n"
        "    def register_for_auto_class(cls):\n"
        "        pass\n"
    )
    found = msplora.doctor(base, adapter)
    assert found[BASE].status == "skipped"
    assert "brings its own Python code, which was not run" in found[BASE].said
    assert not (tmp_path / "ran").exists()
    found = msplora.doctor(BaseOptions(base, trust_remote_code=True), adapter)
    assert found[BASE].status == "passed"
    assert f"{VOCABULARY - 4} tokens of {VOCABULARY}" in found[BASE].said


def test_another_revision_than_the_adapter_names(tmp_path: Path) -> None:
    base, adapter = save_lora(tmp_path)
    set_config(adapter, base_model_name_or_path=base, revision="v2")
    check = msplora.doctor(base, adapter)[BASE]
    assert check.status == "passed"
    assert check.said.endswith("It is the base that the adapter names.")
    check = msplora.doctor(BaseOptions(base, revision="v3"), adapter)[BASE]
    assert check.status == "warning"
    assert "at revision 'v3', where the adapter names 'v2'" in check.said


def save_llava(folder: Path, targets: str, **changes: Any) -> tuple[str, Path]:
    MODELS["llava"].model().save_pretrained(folder / "base")
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **changes)
    model: Any = get_peft_model(MODELS["llava"].model(), config)
    model.save_pretrained(folder / "adapter")
    return str(folder / "base"), folder / "adapter"


def test_a_model_of_images_and_text_that_is_called_a_causal_one(tmp_path: Path) -> None:
    base, adapter = save_llava(tmp_path, r".*language_model.*q_proj", task_type="CAUSAL_LM")
    assert msplora.doctor(base, adapter).ok
    msplora.to_merged(adapter, tmp_path / "merged", base=base)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]


def test_a_vision_tower_that_no_image_reaches(tmp_path: Path) -> None:
    base, adapter = save_llava(tmp_path, r".*vision_tower.*q_proj")
    found = msplora.doctor(base, adapter)
    assert found.ok, statuses(found)
    check = found["changes the output"]
    assert check.status == "skipped"
    assert "The inputs do not reach the weights that it adapts" in check.said


@conversions
def test_names_that_an_earlier_transformers_gave(tmp_path: Path) -> None:
    base, adapter = save_llava(tmp_path, r".*language_model.*(q|v)_proj")
    now = msplora.analyse(adapter, base=base, intruder_vectors=0).adapters[0]
    old = "base_model.model.language_model.model."
    new = "base_model.model.model.language_model."
    edit(adapter, lambda its: {name.replace(new, old): t for name, t in its.items()})
    assert all(name.startswith(old) for name in load_file(adapter / WEIGHTS))
    found = msplora.doctor(base, adapter)
    assert found.ok, statuses(found)
    assert found[LOADED].status == "passed"
    assert "which PEFT translates" in found[LOADED].said
    then = msplora.analyse(adapter, base=base, intruder_vectors=0).adapters[0]
    assert then.kinds == now.kinds
    edit(adapter, lambda its: {name.replace("layers.1", "layrs.1"): t for name, t in its.items()})
    check = msplora.doctor(base, adapter)[LOADED]
    assert (check.status, check.figures["lost"]) == ("failed", 4)


@conversions
def test_experts_that_an_earlier_transformers_had_as_layers(tmp_path: Path) -> None:
    MODELS["mixtral"].model(2).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(MODELS["mixtral"].model(2), config).save_pretrained(tmp_path / "adapter")
    adapter, shapes = tmp_path / "adapter", {"w1": (24, 32), "w3": (24, 32), "w2": (32, 24)}
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for name, (out_features, in_features) in shapes.items():
                key = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                key = f"base_model.model.{key}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(4, in_features) / 8
                tensors[f"{key}.lora_B.weight"] = torch.randn(out_features, 4) / 8
    save_file(tensors, adapter / WEIGHTS)
    set_config(adapter, target_modules=sorted(shapes))
    base = str(tmp_path / "base")
    found = msplora.doctor(base, adapter)
    assert found[LOADED].status == "passed", found[LOADED].said
    assert found["changes the output"].status == "passed"
    msplora.analyse(adapter)
    refused(adapter, base=base, match=r"stores as one now.* Analyse it without --base")


@pytest.mark.parametrize("lost", ["local/3/", "v_proj"])
def test_a_file_without_pairs_that_only_the_base_tells_of(lost: str, tmp_path: Path) -> None:
    """A kind's last layer, or all of a target: the fingerprint says that it is the right base."""
    base, adapter = save(tmp_path)
    edit(adapter, lambda its: {name: t for name, t in its.items() if lost not in name})
    found = msplora.doctor(base, adapter)
    assert statuses(found) == {"the file is whole": "failed", BASE: "skipped"}
    assert lost in found["the file is whole"].said
    assert "The base has the sites that the adapter was made for" in found["the file is whole"].said
    assert found["the file is whole"].advice.startswith("Save or copy it again")
    set_config(adapter, fingerprint=None)
    assert statuses(msplora.doctor(base, adapter)) == {
        "the file is whole": "passed",
        BASE: "failed",
    }


def test_too_little_memory_is_not_the_bases_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    base, adapter = save_lora(tmp_path)
    monkeypatch.setattr(PeftModel, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        msplora.doctor(base, adapter)


def test_a_pyramid_in_float8_is_put_on(tmp_path: Path) -> None:
    base, adapter = save(tmp_path)
    edit(adapter, lambda its: {name: t.to(torch.float8_e4m3fn) for name, t in its.items()})
    found = msplora.doctor(base, adapter)
    assert found.ok, statuses(found)
    assert found[LOADED].status == "passed"
