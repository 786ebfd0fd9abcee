"""Converting adapters of bases that are not as they were adapted: other heads, ties, images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import msplora
from msplora.adapted import load_adapted
from msplora.errors import AdapterFileError, BaseModelError, UnsupportedError
from msplora.loading import dtype_argument
from msplora.merging import unloaded
from msplora.probing import probe_inputs
from tiny import EXPERTS_ARE_PARAMETERS, MODELS, llama
from tiny_saved import byte_tokenizer

hf: Any = transformers  # whose configs take more than their signatures say
ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


def adapt(folder: Path, model: Any, targets: Any, config: Any = None, **options: Any) -> Path:
    options = {"r": 4, "init_lora_weights": False, "target_modules": targets} | options
    get_peft_model(model, (config or msplora.MSPLoraConfig)(**options)).save_pretrained(
        str(folder / "adapter")
    )
    return folder / "adapter"


def change(adapter: Path, how: Any) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(how(load_file(file)), file, {"format": "pt"})


def of_five_classes(folder: Path, base: Any, loader: Any, head: str, targets: Any) -> Path:
    """An adapter with a head for five classes, of a base that has none or another one."""
    torch.manual_seed(0)
    base.save_pretrained(folder / "base")
    model = loader.from_pretrained(folder / "base", num_labels=5, ignore_mismatched_sizes=True)
    return adapt(folder, model, targets, modules_to_save=[head], task_type="SEQ_CLS")


T5: dict[str, Any] = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 2,
    "vocab_size": 64,
}


@pytest.mark.parametrize(("kind", "named"), [("bert", True), ("t5", False), ("xlnet", True)])
def test_a_classifier_s_base_may_have_another_head(tmp_path: Path, kind: str, named: bool) -> None:
    base, loader, head, targets = {
        "bert": (
            lambda: hf.BertForSequenceClassification(hf.BertConfig(num_labels=2, **ENCODER)),
            hf.BertForSequenceClassification,
            "classifier",
            ["query"],
        ),
        "t5": (
            lambda: hf.T5ForConditionalGeneration(
                hf.T5Config(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **T5)
            ),
            hf.T5ForSequenceClassification,
            "classification_head",
            ["q"],
        ),
        "xlnet": (
            lambda: hf.XLNetLMHeadModel(
                hf.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=48, vocab_size=64)
            ),
            hf.XLNetForSequenceClassification,
            "logits_proj",
            ["layer_1"],
        ),
    }[kind]
    adapter = of_five_classes(tmp_path, base(), loader, head, targets)
    if named:
        content = {"classes": {"labels": list("abcde")}}
        (adapter / "task.json").write_text(json.dumps(content))
    if kind == "xlnet":  # whose summary is new too, and is not brought
        with pytest.warns(UserWarning, match=r"random numbers.*modules_to_save"):
            model: Any = load_adapted(adapter)
    else:
        model = load_adapted(adapter)
    assert model.config.num_labels == 5
    assert (model.config.id2label[4] == "e") is named


def test_a_head_that_the_adapter_does_not_bring_is_not_invented(tmp_path: Path) -> None:
    base = hf.BertForSequenceClassification(hf.BertConfig(num_labels=2, **ENCODER))
    adapter = of_five_classes(
        tmp_path, base, hf.BertForSequenceClassification, "classifier", ["query"]
    )
    change(adapter, lambda its: {key: t for key, t in its.items() if "classifier.b" not in key})
    with pytest.raises(BaseModelError, match=r"does not bring.*classifier\.bias"):
        msplora.to_lora(adapter, tmp_path / "lora")


def test_a_file_without_its_head_is_refused(tmp_path: Path) -> None:
    MODELS["bert"].model(2).save_pretrained(tmp_path / "base")
    model = hf.BertForSequenceClassification.from_pretrained(str(tmp_path / "base"))
    adapter = adapt(tmp_path, model, ["query"], task_type="SEQ_CLS")
    loaded = load_adapted(adapter)
    change(adapter, lambda its: {key: t for key, t in its.items() if "classifier" not in key})
    for convert in (msplora.to_lora, msplora.to_merged):
        with pytest.raises(AdapterFileError, match=r"does not fit.*classifier.*Is it whole"):
            convert(adapter, tmp_path / "out")
    with pytest.raises(AdapterFileError, match="classifier"):
        msplora.hotswap(loaded, adapter)


def test_a_merged_decoder_that_classifies_answers_batches(tmp_path: Path) -> None:
    config = llama(2).config
    hf.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    model: Any = hf.LlamaForSequenceClassification.from_pretrained(str(tmp_path / "base"))
    assert model.config.pad_token_id is None
    adapter = adapt(tmp_path, model, ["q_proj"], task_type="SEQ_CLS")
    byte_tokenizer().save_pretrained(adapter)
    msplora.to_merged(adapter, tmp_path / "merged")
    merged: Any = hf.LlamaForSequenceClassification.from_pretrained(str(tmp_path / "merged"))
    ids = torch.tensor([[5, 6, 7], [5, 6, 2]])  # padded with the tokenizer's <pad>
    with torch.no_grad():
        alone = merged(ids[1:, :2]).logits
        together = merged(ids, attention_mask=(ids != 2).long()).logits
    torch.testing.assert_close(together[1:], alone)


@pytest.mark.parametrize("damage", ["of another tree", "without a block"])
def test_a_lora_that_does_not_fit_is_not_merged(tmp_path: Path, damage: str) -> None:
    llama(2).save_pretrained(tmp_path / "base")  # pyright: ignore
    model = hf.LlamaForCausalLM.from_pretrained(str(tmp_path / "base"))
    adapter = adapt(tmp_path, model, ["q_proj"], LoraConfig, task_type="CAUSAL_LM")
    if damage == "of another tree":
        change(
            adapter,
            lambda its: {
                key.replace("model.layers", "model.language_model.layers"): tensor
                for key, tensor in its.items()
            },
        )
    else:
        change(adapter, lambda its: {key: t for key, t in its.items() if "layers.1" not in key})
    with pytest.raises(AdapterFileError, match=r"lacks '.*lora_A.*Is it whole"):
        msplora.to_merged(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_merging_into_a_tied_weight_unties_it(tmp_path: Path, target: str) -> None:
    base: Any = llama(2, tie_word_embeddings=True)
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = hf.LlamaForCausalLM.from_pretrained(
        str(tmp_path / "base"), **{dtype_argument(): "auto"}
    )
    adapter = adapt(tmp_path, model, ["q_proj", target], LoraConfig, task_type="CAUSAL_LM")
    its = msplora.to_merged(adapter, tmp_path / "merged").comparison
    assert its is not None
    assert its.shown
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    before = load_file(tmp_path / "base" / "model.safetensors")
    other = {"lm_head": "model.embed_tokens", "embed_tokens": "lm_head"}[target]
    assert torch.equal(merged[f"{other}.weight"], before["model.embed_tokens.weight"])
    with pytest.raises(UnsupportedError, match=r"adapts .*both or none. Leave it a LoRA, or merge"):
        msplora.to_msplora(adapter, tmp_path / "pyramid", ranks=[4], groups=[0])


START = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}


def trained_whole(folder: Path, model: Any, name: str, targets: list[str], task: str) -> Path:
    """An adapter of a saved base that has trained the module `name` whole."""
    model.save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base")
    options = {"r": 4, "init_lora_weights": False, "task_type": task, "modules_to_save": [name]}
    adapted = get_peft_model(model, msplora.MSPLoraConfig(target_modules=targets, **options))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "modules_to_save" in key:
                parameter += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


@pytest.mark.parametrize("trained", ["lm_head", "embed_tokens"])
def test_a_head_that_is_no_longer_the_embedding_is_said_to_be_none(
    tmp_path: Path, trained: str
) -> None:
    """Other releases of transformers, and servers, go by the config and would tie them again."""
    base = llama(2, tie_word_embeddings=True)
    adapter = trained_whole(tmp_path, base, trained, ["q_proj"], "CAUSAL_LM")
    its = msplora.to_merged(adapter, tmp_path / "merged").comparison
    assert its is not None
    assert its.shown
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_the_config_of_the_text_model_says_so_too(tmp_path: Path) -> None:
    model: Any = MODELS["llava"].model(2)
    for config in (model.config, model.config.text_config):
        config.tie_word_embeddings = True
    model.tie_weights()
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    merged = unloaded(get_peft_model(model, msplora.MSPLoraConfig(**options)))
    assert merged.lm_head.weight is not merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings is False
    assert merged.config.text_config.tie_word_embeddings is False


def test_what_stays_tied_is_left_tied(tmp_path: Path) -> None:
    kept = llama(2, tie_word_embeddings=True)
    config = msplora.MSPLoraConfig(target_modules=["q_proj"], trainable_token_indices=[3])
    assert unloaded(get_peft_model(kept, config)).config.tie_word_embeddings is True


BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


@pytest.mark.skipif(not EXPERTS_ARE_PARAMETERS, reason="transformers 4 ties them as it loads")
@pytest.mark.parametrize(
    ("build", "target"),
    [
        (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**START, **T5)), "q"),
        (lambda: hf.UMT5ForConditionalGeneration(hf.UMT5Config(**START, **T5)), "q"),
        (lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)), "q_proj"),
    ],
    ids=["t5", "umt5", "bart"],
)
def test_the_embedding_of_an_encoder_and_a_decoder_stays_theirs(
    tmp_path: Path, build: Callable[[], Any], target: str
) -> None:
    """What the config says of the head it says of these too; UMT5 asks it whether to scale."""
    adapter = trained_whole(tmp_path, build(), "lm_head", [target], "SEQ_2_SEQ_LM")
    its = msplora.to_merged(adapter, tmp_path / "merged").comparison
    assert its is not None
    assert its.shown
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True


def test_a_pattern_stays_where_a_layer_is_not_changed(tmp_path: Path) -> None:
    llama(4).save_pretrained(tmp_path / "base")  # pyright: ignore
    model = hf.LlamaForCausalLM.from_pretrained(str(tmp_path / "base"))
    options = {"layers_to_transform": [0, 1, 2], "layers_pattern": "layers"}
    adapter = adapt(tmp_path, model, ["q_proj"], LoraConfig, task_type="CAUSAL_LM", **options)
    change(adapter, lambda its: {k: t * ("layers.2" not in k) for k, t in its.items()})
    found = msplora.to_msplora(adapter, tmp_path / "out", ranks=[4], groups=[0])
    assert [site.block for site in found.sites] == [0, 1]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["layers_to_transform"], config["layers_pattern"]) == ([0, 1], "layers")


def test_images_of_models_that_take_any_size(tmp_path: Path) -> None:
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    hf.ResNetForImageClassification(config).save_pretrained(tmp_path / "base")
    model = hf.ResNetForImageClassification.from_pretrained(str(tmp_path / "base"))
    assert probe_inputs(model, "")["pixel_values"].shape == (2, 3, 224, 224)
    content = {"crop_size": {"height": 64, "width": 32}}
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(content))
    assert probe_inputs(model, "")["pixel_values"].shape == (2, 3, 64, 32)
    adapter = adapt(tmp_path, model, r".*layer\..*convolution")
    assert msplora.to_lora(adapter, tmp_path / "lora").comparison is not None


def test_what_no_test_inputs_fit_is_refused_with_a_way_out(tmp_path: Path) -> None:
    hf.BertForMultipleChoice(hf.BertConfig(**ENCODER)).save_pretrained(tmp_path / "base")
    model = hf.BertForMultipleChoice.from_pretrained(str(tmp_path / "base"))
    adapter = adapt(tmp_path, model, ["query"])
    with pytest.raises(UnsupportedError, match=r"does not run on the test inputs.*--no-verify"):
        msplora.to_lora(adapter, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    msplora.to_lora(adapter, tmp_path / "lora", verify=False)


@pytest.mark.parametrize("config", [LoraConfig, msplora.MSPLoraConfig])
def test_embeddings_of_more_tokens_that_were_trained_whole(config: Any, tmp_path: Path) -> None:
    """PEFT writes them several times, and reads one of these."""
    model = llama(layers=2)
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(model.config.vocab_size + 3)
    options = {"modules_to_save": ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"}
    adapter = adapt(tmp_path, model, ["q_proj"], config, **options)
    names = {name for name in load_file(adapter / "adapter_model.safetensors") if "lm_head" in name}
    assert "base_model.model.lm_head.weight" in names
    assert len(names) > 1
    found = msplora.doctor(str(tmp_path / "base"), adapter)
    for name in ("made for this base", "all of it is loaded", "merging keeps the output"):
        assert found[name].status == "passed", found[name].said
    assert msplora.to_merged(adapter, tmp_path / "merged").comparison is not None
    if config is LoraConfig:
        msplora.to_msplora(adapter, tmp_path / "pyramid", ranks=[4], groups=[0])
        adapter = tmp_path / "pyramid"
    msplora.to_lora(adapter, tmp_path / "lora")
    written = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert [name for name in written if "lm_head" in name] == ["base_model.model.lm_head.weight"]
