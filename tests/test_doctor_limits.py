"""What `msplora doctor` cannot tell or do: small changes in half precision, merging, speech."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear

import msplora
from examined import edit, save, save_lora, scale_b, statuses
from msplora.diagnosis import outputs
from msplora.diagnosis.patient import Patient
from msplora.diagnosis.restored import merged_and_unmerged
from msplora.errors import MSPLoraError
from msplora.loading import BaseOptions
from msplora.probing import logits
from oracle import randomise
from tiny import MODELS


@pytest.mark.parametrize(
    ("by", "status"),
    [(1e-3, "passed"), (1e-4, "warning"), pytest.param(0, "failed", marks=pytest.mark.slow)],
)
def test_a_change_that_bfloat16_can_tell_is_one(by: float, status: str, tmp_path: Path) -> None:
    base, adapter = save(tmp_path, by=by)
    check = msplora.doctor(BaseOptions(base, "bfloat16"), adapter)["changes the output"]
    assert check.status == status, check.said
    if by:
        assert 0 < check.figures["relative"] < 0.0625  # pyright: ignore
        assert msplora.doctor(base, adapter)["changes the output"].status == "passed"
    if status == "warning":
        assert "rounding in bfloat16 alone" in check.said
        assert "--dtype float32" in check.advice


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A mixture of experts in bfloat16, whose rounding sends tokens to other experts."""
    folder = tmp_path_factory.mktemp("routed")
    torch.manual_seed(0)
    sizes: Any = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "vocab_size": 64,
        "num_hidden_layers": 4,
    }
    heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.MixtralConfig(
        **sizes, **heads, num_local_experts=8, max_position_embeddings=64, initializer_range=0.2
    )
    hf.MixtralForCausalLM(config).bfloat16().save_pretrained(folder / "base")
    base: Any = hf.MixtralForCausalLM.from_pretrained(folder / "base")
    ours = msplora.MSPLoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, ours)
    randomise(model)
    scale_b(model, 0.1).save_pretrained(folder / "adapter")
    return str(folder / "base"), folder / "adapter"


def test_what_rounding_does_to_routers_is_no_failure_of_merging(
    routed: tuple[str, Path], tmp_path: Path
) -> None:
    found = msplora.doctor(*routed)
    check = found["merging keeps the output"]
    assert check.status == "warning", check.said
    assert "the rest is rounding to bfloat16, which grows" in check.said
    assert "sends tokens to other experts" in check.said
    assert check.figures["in_float32"] < 1e-4 < check.figures["difference"]  # pyright: ignore
    assert "--dtype float32" in check.advice
    assert found.ok, statuses(found)
    its = msplora.to_merged(routed[1], tmp_path / "merged").comparison
    assert its is not None
    assert not its.explained
    precise = msplora.doctor(BaseOptions(routed[0], "float32"), routed[1])
    assert precise["merging keeps the output"].status == "passed"


def test_a_wrong_merge_fails_in_half_precision_too(
    routed: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(self: Any, *_: Any, **__: Any) -> None:
        self.base_layer.weight.data += 2 * self.get_delta_weight("default")
        self.merged_adapters.append("default")

    monkeypatch.setattr(LoraLinear, "merge", doubled)
    check = msplora.doctor(*routed)["merging keeps the output"]
    assert check.status == "failed"
    assert "is not the sum of weight and update" in check.said
    assert "written" not in check.said + check.advice


@pytest.mark.parametrize(
    ("dtype", "quantized", "status"),
    [("float32", False, "failed"), ("bfloat16", False, "passed"), ("float32", True, "passed")],
)
def test_rounding_is_not_held_against_a_lora_of_equal_updates(
    dtype: str, quantized: bool, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rough(*its: Any) -> torch.Tensor:
        return logits(*its) + 2

    monkeypatch.setattr(outputs, "logits", rough)
    if quantized:  # whose kernels round otherwise after another loading
        monkeypatch.setattr(Patient, "is_quantized", True)
    base, adapter = save(tmp_path)
    check = msplora.doctor(BaseOptions(base, dtype), adapter)["the converted LoRA is equal"]
    assert check.status == status, check.said
    assert "differs by up to 2.0" in check.said
    assert ("the updates of all weights are equal" in check.said) == (status == "passed")


def test_nothing_is_said_to_be_allowed_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "logits", lambda *its: logits(*its) + 1e-3)
    check = msplora.doctor(*save(tmp_path, by=1))["the converted LoRA is equal"]
    assert check.status == "passed"  # it is small beside what the adapter does
    assert check.figures["difference"] > check.figures["tolerance"]  # pyright: ignore
    assert "allowed" not in check.said


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_classifier_that_answers_at_the_end_of_a_text(name: str, tmp_path: Path) -> None:
    """Its test inputs have an end, and its head a name that PEFT does not fill in."""
    sizes: Any = {"vocab_size": 512, "d_model": 16, "num_labels": 3}
    bart: Any = {
        f"{its}_{what}": number
        for its in ("encoder", "decoder")
        for what, number in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
    }
    t5: Any = {"d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "eos_token_id": 1}
    base: Any = (
        hf.BartForSequenceClassification(hf.BartConfig(**sizes, **bart, init_std=0.2))
        if name == "bart"
        else hf.T5ForSequenceClassification(hf.T5Config(**sizes, **t5, decoder_start_token_id=0))
    )
    base.save_pretrained(tmp_path / "base")
    config = msplora.MSPLoraConfig(
        r=4,
        target_modules=["q_proj" if name == "bart" else "q"],
        task_type="SEQ_CLS",
        modules_to_save=["classification_head"],
    )
    model: Any = get_peft_model(type(base).from_pretrained(tmp_path / "base"), config)
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    found = msplora.doctor(str(tmp_path / "base"), tmp_path / "adapter")
    assert found.ok, statuses(found)
    assert found["changes the output"].status == "passed"
    edit(tmp_path / "adapter", lambda its: {k: t for k, t in its.items() if "head" not in k})
    findings = msplora.inspect(tmp_path / "adapter").findings
    assert "classification_head" in next(its.text for its in findings if its.rule == "missing part")


def save_convnext(folder: Path, method: Any, **changes: Any) -> tuple[str, Path]:
    """An image model without an embedding; its convolutions have as many groups as channels."""
    config = hf.ConvNextConfig(
        hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, image_size=16, num_labels=3
    )
    hf.ConvNextForImageClassification(config).save_pretrained(folder / "base")
    base: Any = hf.ConvNextForImageClassification.from_pretrained(folder / "base")
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "layer_scale" in name:
                parameter.fill_(1)
    base.save_pretrained(folder / "base")
    model: Any = get_peft_model(base, method(target_modules=["dwconv"], **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "msplora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "adapter")
    return str(folder / "base"), folder / "adapter"


def save_biased(folder: Path) -> tuple[str, Path]:
    base, adapter = save_lora(folder, by=0.1, lora_bias=True)
    edit(adapter, lambda its: {k: t + 0.01 if k.endswith("bias") else t for k, t in its.items()})
    return base, adapter


UNMERGEABLE = {
    "grouped": (
        lambda folder: save_convnext(folder, LoraConfig, r=8),
        "groups > 1",
        "passed",
    ),
    "grouped pyramid": (
        lambda folder: save_convnext(folder, msplora.MSPLoraConfig, ranks=[8, 8], groups=[1, 0]),
        "groups > 1",
        "passed",
    ),
    "bias": (save_biased, "the base layer has no bias", "passed"),
    "activated": (
        lambda folder: save_lora(
            folder, by=0.1, task_type="CAUSAL_LM", alora_invocation_tokens=[62, 63]
        ),
        "aLoRA does not support merging",
        "skipped",  # the inputs do not hold the tokens
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNMERGEABLE)
def test_what_peft_cannot_merge_is_examined_unmerged(name: str, tmp_path: Path) -> None:
    make, said, applied = UNMERGEABLE[name]
    found = msplora.doctor(*make(tmp_path))
    its = statuses(found)
    for dtype in ("bfloat16", "float16"):
        assert its.pop(f"merged weights in {dtype}") == "skipped"
    for check in ("unmerging restores the base", "merging keeps the output"):
        assert its.pop(check) == "skipped"
        assert said in found[check].said
        assert "PEFT cannot merge '" in found[check].said
    assert its.pop("changes the output") == applied
    converted = "passed" if "pyramid" in name else "skipped"
    assert its.pop("the converted LoRA is equal") == converted
    assert set(its.values()) == {"passed"}, [check.said for check in found.checks]


@pytest.mark.parametrize("changes", [{}, {"lora_bias": True}])
@pytest.mark.filterwarnings("ignore")
def test_what_was_merged_once_is_put_back_bit_by_bit(changes: dict[str, Any]) -> None:
    """Of a bias that cannot be merged PEFT says so after it has changed the weight."""
    base = MODELS["llama"].model(dtype=torch.bfloat16)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **changes)
    model: Any = get_peft_model(base, config)
    before = {name: its.clone() for name, its in model.state_dict().items()}
    found = merged_and_unmerged(model.get_base_model())
    assert found.exact < found.parameters  # it had changed
    assert bool(found.why_not_merged) == bool(changes)
    after = model.state_dict()
    assert all(torch.equal(after[name], its) for name, its in before.items())


def test_a_model_of_speech_is_refused_with_what_can_be_done(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "vocab_size": 60, "num_mel_bins": 8, "max_source_positions": 20}
    layers = {
        f"{its}_{what}": 2
        for its in ("encoder", "decoder")
        for what in ("layers", "attention_heads")
    }
    tokens = {f"{its}_token_id": 1 for its in ("pad", "bos", "eos", "decoder_start")}
    config = hf.WhisperConfig(**sizes, **layers, **tokens, suppress_tokens=None)
    whisper = hf.WhisperForConditionalGeneration(config)
    whisper.save_pretrained(tmp_path / "base")
    model: Any = get_peft_model(whisper, LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MSPLoraError, match="takes 'input_features'") as raised:
        msplora.doctor(str(tmp_path / "base"), tmp_path / "adapter")
    assert "msplora inspect looks at the files" in str(raised.value)
    assert "--no-verify" not in str(raised.value)
