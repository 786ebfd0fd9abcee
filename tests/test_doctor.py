"""`msplora doctor`: a sound adapter passes every check, and each check fails where it should."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from peft import get_peft_model
from safetensors.torch import load_file, save_file

import msplora
from adapted_llama import adapted
from examined import WEIGHTS, edit, save, save_lora, scale_b, statuses
from msplora.diagnosis import outputs
from msplora.errors import MSPLoraError
from msplora.loading import BaseOptions
from msplora.random_weights import RandomWeightsWarning
from runs import answered_rows, save_decoder, write_jsonl
from runs import msplora as command
from tiny import MODELS, llama


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-all-linear", {"task_type": "CAUSAL_LM"}),
        pytest.param("bert", {"task_type": "SEQ_CLS"}, marks=pytest.mark.slow),
        pytest.param("t5", {"task_type": "SEQ_2_SEQ_LM"}, marks=pytest.mark.slow),
        pytest.param("vit", {}, marks=pytest.mark.slow),
        pytest.param("gpt2", {"use_dora": True}, marks=pytest.mark.slow),
    ],
)
def test_a_sound_pyramid_fails_nothing(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    found = msplora.doctor(*save(tmp_path, name, **changes))
    its = statuses(found)
    rounding = {its.pop("merged weights in bfloat16"), its.pop("merged weights in float16")}
    assert rounding == ({"skipped"} if changes.get("use_dora") else {"passed"})
    assert set(its.values()) == {"passed"}
    assert found.ok
    assert found["the converted LoRA is equal"].figures["difference"] < 1e-5  # pyright: ignore
    assert json.loads(found.to_json())["ok"] is True


def test_a_sound_lora_fails_nothing(tmp_path: Path) -> None:
    found = msplora.doctor(*save_lora(tmp_path))
    its = statuses(found)
    assert its.pop("the converted LoRA is equal") == "skipped"
    assert set(its.values()) == {"passed"}


@pytest.mark.slow
def test_what_rounding_loses_is_what_it_loses(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, by=1e-5, target_modules=["q_proj"], layers_to_transform=[1])
    found = msplora.doctor(BaseOptions(base, "bfloat16"), adapter)
    model: Any = peft.PeftModel.from_pretrained(MODELS["llama"].model(), str(adapter))
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    weight = layer.base_layer.weight.detach().bfloat16().float()
    delta = layer.get_delta_weight("default").detach()
    kept = (weight + delta).bfloat16().float() - weight
    check = found["merged weights in bfloat16"]
    lost = float(delta[kept == 0].square().sum() / delta.square().sum())
    error = float((kept - delta).norm() / delta.norm())
    assert 0.5 < lost < 1
    assert check.figures["lost"] == pytest.approx(lost, rel=1e-4)
    assert check.figures["error"] == pytest.approx(error, rel=1e-4)
    assert check.status == "failed"  # the base is in bfloat16: it would be merged so
    assert "float32" in check.advice
    assert msplora.doctor(base, adapter)["merged weights in bfloat16"].status == "warning"


@pytest.mark.slow
def test_unmerging_a_large_update_does_not_restore_a_small_weight(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, by=1)
    found = msplora.doctor(BaseOptions(base, "bfloat16"), adapter)
    check = found["unmerging restores the base"]
    assert check.status == "failed"
    model: Any = peft.PeftModel.from_pretrained(MODELS["llama"].model().bfloat16(), str(adapter))
    layers = [model.get_base_model().model.layers[place].self_attn for place in range(4)]
    weights = [its.base_layer.weight for of in layers for its in (of.q_proj, of.v_proj)]
    before = torch.cat([its.detach().double().flatten() for its in weights])
    model.merge_adapter()
    model.unmerge_adapter()
    after = torch.cat([its.detach().double().flatten() for its in weights])
    expected = float((after - before).norm() / before.norm())
    assert check.figures["error"] == pytest.approx(expected, rel=1e-6)
    # The drift of one check is not handed on to the next.
    assert found["the converted LoRA is equal"].status == "passed"


def test_an_adapter_that_changes_nothing(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, by=0)
    result = command("doctor", base, adapter)
    assert result.code == 1
    assert "failed: changes the output" in result.out
    assert "the output is the same" in " ".join(result.out.split())


@pytest.mark.parametrize("pad", [pytest.param(0, marks=pytest.mark.slow), None])
def test_a_trained_head_is_not_the_adapters_effect(pad: int | None, tmp_path: Path) -> None:
    MODELS["llama"].model().save_pretrained(tmp_path / "base")
    base: Any = hf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, pad_token_id=pad
    )
    base.config.save_pretrained(tmp_path / "base")  # with or without a token for padding
    config = msplora.MSPLoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    model: Any = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")  # B is zero
    found = [msplora.doctor(str(tmp_path / "base"), tmp_path / "adapter") for _ in range(2)]
    assert found[0] == found[1]
    check = found[0]["changes the output"]
    assert (check.status, check.figures["effect"]) == ("failed", 0)


def test_numbers_beyond_float32_pass_no_check(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, target_modules=["q_proj"])
    edit(adapter, lambda its: {key: t * 1e30 for key, t in its.items()})
    found = msplora.doctor(base, adapter)
    its = statuses(found)
    assert its["changes the output"] == its["unmerging restores the base"] == "failed"
    assert its["the converted LoRA is equal"] == its["merging keeps the output"] == "skipped"
    for name in ("factors in {}", "merged weights in {}"):
        assert its[name.format("float16")] == "warning"
    assert its["merged weights in bfloat16"] == "warning"
    json.loads(found.to_json())


def test_a_base_that_is_damaged_is_told_from_a_training_that_diverged(tmp_path: Path) -> None:
    base, adapter = save(tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    edit(Path(base), lambda its: its | {name: its[name] * torch.nan}, "model.safetensors")
    check = msplora.doctor(base, adapter)["changes the output"]
    assert check.status == "failed"
    assert f"so does the base's {name}" in check.said
    assert check.advice == "Copy or download the base again."


def test_tensors_that_peft_leaves_out(tmp_path: Path) -> None:
    base, adapter = save_lora(tmp_path)
    edit(adapter, lambda its: {k.replace("layers.1", "layrs.1"): t for k, t in its.items()})
    found = msplora.doctor(base, adapter)
    check = found["all of it is loaded"]
    assert check.status == "failed"
    assert (check.figures["lost"], check.figures["new"], check.figures["changed"]) == (4, 4, 0)
    assert "layrs.1" in check.said
    assert found["changes the output"].status == "passed"


@pytest.mark.slow
def test_numbers_beyond_float16(tmp_path: Path) -> None:
    base, adapter = save_lora(tmp_path)
    edit(adapter, lambda its: {k: t * (1e6 if "lora_A" in k else 1e-7) for k, t in its.items()})
    found = msplora.doctor(base, adapter)
    assert found["factors in float16"].status == "warning"
    assert found["factors in bfloat16"].status == "passed"
    edit(adapter, lambda its: {k: t * (1 if "lora_A" in k else 1e6) for k, t in its.items()})
    check = msplora.doctor(base, adapter)["activations in float16"]
    assert check.status == "warning"
    assert "the adapter's doing" in check.said
    assert check.figures["largest"] > 65504 > check.figures["without"]  # pyright: ignore


@pytest.mark.slow
def test_a_merge_or_a_conversion_that_answers_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = save(tmp_path)
    right = outputs.lora_of

    def wrong(model: Any) -> Any:
        tensors, config = right(model)
        return tensors, config | {"lora_alpha": 2 * config["lora_alpha"]}

    monkeypatch.setattr(outputs, "lora_of", wrong)

    def doubled(self: Any, *_: Any, **__: Any) -> None:
        self.base_layer.weight.data += 2 * self.get_delta_weight("default")
        self.merged_adapters.append("default")

    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "merge", doubled)
    its = statuses(msplora.doctor(base, adapter))
    assert its["the converted LoRA is equal"] == "failed"
    assert its["merging keeps the output"] == "failed"


@pytest.mark.slow
def test_a_base_of_another_shape_name_or_kind(tmp_path: Path) -> None:
    base, adapter = save(tmp_path)
    llama(layers=5).save_pretrained(tmp_path / "deeper")  # pyright: ignore
    result = command("doctor", tmp_path / "deeper", adapter)
    assert result.code == 1
    assert "failed: made for this base" in result.out
    MODELS["llama"].model().save_pretrained(tmp_path / "moved")
    found = msplora.doctor(str(tmp_path / "moved"), adapter)
    assert found["made for this base"].status == "warning"
    assert base in found["made for this base"].said
    assert found.ok
    _, lora = save_lora(tmp_path / "lora")
    llama(hidden_size=64).save_pretrained(tmp_path / "wide")  # pyright: ignore
    found = msplora.doctor(str(tmp_path / "wide"), lora)
    assert statuses(found) == {"the file is whole": "passed", "made for this base": "failed"}
    assert "size mismatch" in found.checks[1].said


@pytest.mark.slow
def test_more_tokens_than_the_base_has(tmp_path: Path) -> None:
    base, adapter = save(tmp_path)
    save_decoder(tmp_path / "other", vocab_size=128)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_bytes((tmp_path / "other" / name).read_bytes())
    assert "53 tokens of 64" in msplora.doctor(base, adapter)["made for this base"].said
    tokens = json.loads((adapter / "tokenizer.json").read_text())
    tokens["model"]["vocab"] |= {f"more{place}": 53 + place for place in range(20)}
    (adapter / "tokenizer.json").write_text(json.dumps(tokens))
    check = msplora.doctor(base, adapter)["made for this base"]
    assert check.status == "failed"
    assert "73 tokens, and the base's embedding 64 rows" in check.said


@pytest.mark.slow
def test_rows_of_a_file(tmp_path: Path) -> None:
    save_decoder(tmp_path / "base")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base, task_type="CAUSAL_LM")
    scale_b(model, 0.1).save_pretrained(tmp_path / "adapter")
    rows = write_jsonl(tmp_path / "rows.jsonl", answered_rows(12))
    found = msplora.doctor(str(tmp_path / "base"), tmp_path / "adapter", data=str(rows))
    assert found.ok
    assert found.inputs == f"the first rows of {rows}"
    longest = max(len((row["prompt"] + row["completion"]).split()) for row in answered_rows(8))
    assert found["changes the output"].said.endswith(f"of {8 * (longest + 2)} places.")
    save_decoder(tmp_path / "narrow", hidden_size=16)
    found = msplora.doctor(str(tmp_path / "narrow"), tmp_path / "adapter", data=str(rows))
    assert statuses(found)["made for this base"] == "failed"


def test_a_file_at_fault_is_blamed_before_the_base(tmp_path: Path) -> None:
    base, adapter = save_lora(tmp_path)
    whole = load_file(adapter / WEIGHTS)
    edit(adapter, lambda its: {k: t for k, t in its.items() if "layers.2." not in k})
    check = msplora.doctor(base, adapter)["all of it is loaded"]
    assert (check.status, check.figures["new"]) == ("failed", 4)
    assert "The file lacks them" in check.advice
    save_file(whole, adapter / WEIGHTS)
    edit(adapter, lambda its: {k: t[:2] if "lora_A" in k else t[:, :2] for k, t in its.items()})
    found = msplora.doctor(base, adapter)
    assert statuses(found) == {"the file is whole": "failed", "made for this base": "skipped"}
    assert "where its rank is 4" in found.checks[0].said


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (BaseOptions("", dtype="float32"), "--dtype"),
        (BaseOptions("", revision="main"), "--revision"),
        (BaseOptions("", trust_remote_code=True), "--trust-remote-code"),
    ],
)
def test_what_does_not_go_with_rows(options: BaseOptions, name: str, tmp_path: Path) -> None:
    base, adapter = save_lora(tmp_path)
    with pytest.raises(MSPLoraError, match=f"{name} does not go with --data"):
        msplora.doctor(replace(options, source=base), adapter, data="rows.jsonl")


def test_damaged_files_beside_the_tensors(tmp_path: Path) -> None:
    base, adapter = save_lora(tmp_path)
    (adapter / "tokenizer.json").write_text("{bad")
    check = msplora.doctor(base, adapter)["made for this base"]
    assert check.status == "failed"
    assert "tokenizer beside the adapter cannot be read" in check.said
    with pytest.raises(MSPLoraError, match="no base is given"):
        msplora.doctor("", adapter)
    for text, said in (('{"peft', "cannot be read"), ('{"peft_type": "LORA", "r": 0}', "r is 0")):
        (adapter / "adapter_config.json").write_text(text)
        with pytest.raises(MSPLoraError, match=said):
            msplora.doctor(base, adapter)


def test_what_cannot_be_examined(tmp_path: Path) -> None:
    base, adapter = save(tmp_path)

    def refused(model: str | Path, its: Path, said: str) -> None:
        result = command("doctor", model, its)
        assert result.code == 1
        assert result.out == ""
        assert said in result.error

    refused(tmp_path / "bas", adapter, "Did you mean")
    refused(base, tmp_path / "adaptr", "Did you mean")
    refused(adapter, adapter, "The folder is an adapter: name its base")
    for step in (20, 100):
        shutil.copytree(adapter, tmp_path / f"run.unfinished/checkpoints/checkpoint-{step}")
    refused(base, tmp_path / "run", "run.unfinished' is unfinished: continue it")
    last = tmp_path / "run.unfinished/checkpoints/checkpoint-100"
    refused(base, tmp_path / "run.unfinished", f"Its last checkpoint is one: '{last}'")
    (last / "adapter_model.safetensors").unlink()  # it was being saved
    last = last.with_name("checkpoint-20")
    refused(base, tmp_path / "run.unfinished", f"Its last checkpoint is one: '{last}'")
    loha: Any = get_peft_model(llama(), peft.LoHaConfig(target_modules=["q_proj"]))
    loha.save_pretrained(tmp_path / "loha")
    refused(base, tmp_path / "loha", "is a LOHA adapter")
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:2000])
    refused(base, adapter, "cut short or damaged")


@pytest.mark.parametrize("kind", ["no head", "no pooler"])
def test_a_base_that_is_partly_random_fails(tmp_path: Path, kind: str) -> None:
    """Each loading makes up what is in no file, so that no answer is the adapter's."""
    if kind == "no head":
        base, adapter = save(tmp_path, task_type="CAUSAL_LM")
        hf.LlamaModel.from_pretrained(base).save_pretrained(base)
        missing = r"lm_head\.weight"
    else:
        base, adapter = save(tmp_path, "deberta", task_type="SEQ_CLS")
        whole = load_file(f"{base}/model.safetensors")
        rest = {key: its for key, its in whole.items() if "pooler" not in key}
        save_file(rest, f"{base}/model.safetensors", metadata={"format": "pt"})
        missing = r"pooler\.dense\.bias"
    check = msplora.doctor(base, adapter)["made for this base"]
    assert check.status == "failed"
    assert re.search(rf"lacks {missing}.*random numbers", check.said)
    assert check.advice.startswith("Pass a base that has them")
    with pytest.warns(RandomWeightsWarning, match=missing):
        msplora.to_lora(adapter, tmp_path / "lora", base=base)


def test_outputs_of_a_model_without_a_head_are_no_choice(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, "bert", task_type="SEQ_CLS")
    assert "first choice" in msplora.doctor(base, adapter)["changes the output"].said
    plain = hf.BertModel.from_pretrained(base)
    config = peft.LoraConfig(
        target_modules=["query"], task_type="FEATURE_EXTRACTION", init_lora_weights=False
    )
    get_peft_model(plain, config).save_pretrained(str(tmp_path / "features"))
    found = msplora.doctor(base, tmp_path / "features")
    assert found["changes the output"].status == "passed"
    assert "first choice" not in found["changes the output"].said
