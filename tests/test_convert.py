"""Conversions, files to files: exact, proved, and nothing is lost when they fail."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import msplora
from msplora import loading
from msplora.adapted import load_adapted
from msplora.companions import NoTokenizerWarning, complete_from_base
from msplora.conversion_card import card_of_lora
from msplora.errors import AdapterFileError, MSPLoraError
from msplora.folder_mark import CONVERSION as MARK
from msplora.folders import OutputError, new_folder
from msplora.plain_lora import lora_of
from msplora.verifying import VerificationError
from tiny import MODELS, VOCABULARY, Tiny, llama

IDS = torch.arange(2 * 9).reshape(2, 9) % VOCABULARY


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A Llama on disk and an adapter of it with random factors."""
    return save_adapter(MODELS["llama"], tmp_path, task_type="CAUSAL_LM")


def save_adapter(tiny: Tiny, folder: Path, **options: Any) -> Path:
    tiny.model().save_pretrained(folder / "base")
    model = type(tiny.model()).from_pretrained(folder / "base")
    config = msplora.MSPLoraConfig(
        target_modules=tiny.targets, init_lora_weights=False, r=4, lora_alpha=4, **options
    )
    get_peft_model(model, config).save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def native_logits(adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_adapted(adapter)(IDS).logits


def test_the_lora_answers_like_the_pyramid(adapter: Path, tmp_path: Path) -> None:
    result = msplora.to_lora(adapter, tmp_path / "lora")
    assert result.rank == 4 + 2 + 1
    assert result.comparison is not None
    assert result.comparison.difference <= 1e-5
    assert result.comparison.effect > 0.01
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    converted = PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            converted(IDS).logits, native_logits(adapter), rtol=1e-5, atol=1e-5
        )


def test_peft_loads_the_lora_without_msplora(adapter: Path, tmp_path: Path) -> None:
    msplora.to_lora(adapter, tmp_path / "lora")
    save_file({"logits": native_logits(adapter)}, tmp_path / "expected.safetensors")
    script = f"""
import sys
sys.modules["msplora"] = None  # importing it fails
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "lora")!r}).eval()
ids = torch.arange(18).reshape(2, 9) % {VOCABULARY}
expected = load_file({str(tmp_path / "expected.safetensors")!r})["logits"]
torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=300)


def test_the_config_is_one_every_server_reads(adapter: Path, tmp_path: Path) -> None:
    msplora.to_lora(adapter, tmp_path / "lora", pad_to="pow2")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 8
    assert isinstance(config["lora_alpha"], int)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert not {"levels", "ranks", "groups", "fingerprint"} & set(config)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name} == {8}
    assert set(tensors) == {
        f"base_model.model.model.layers.{layer}.self_attn.{kind}.lora_{factor}.weight"
        for layer in range(4)
        for kind in ("q_proj", "v_proj")
        for factor in "AB"
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_rounded_once(adapter: Path, tmp_path: Path, dtype: Any) -> None:
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    msplora.to_lora(adapter, tmp_path / "lora", base=base)
    msplora.to_lora(adapter, tmp_path / "half", dtype=dtype)
    exact = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    rounded = load_file(tmp_path / "half" / "adapter_model.safetensors")
    for name, tensor in exact.items():
        assert torch.equal(rounded[name], tensor.to(getattr(torch, dtype)))


def test_holes_are_filled_with_zeros(tmp_path: Path) -> None:
    """Servers with one tensor for all layers, or one for q, k and v, cannot leave any out."""
    adapter = save_adapter(
        Tiny(llama, ["q_proj"]), tmp_path, layers_to_transform=[0, 2], task_type="CAUSAL_LM"
    )
    result = msplora.to_lora(adapter, tmp_path / "lora")
    assert result.comparison is not None
    assert result.comparison.difference <= 1e-6
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    filled = {name for name, tensor in tensors.items() if not tensor.any()}
    assert filled == {
        f"base_model.model.model.layers.{layer}.self_attn.{kind}.lora_{factor}.weight"
        for layer in range(4)
        for kind in ("q_proj", "v_proj")
        for factor in "AB"
        if kind == "v_proj" or layer in (1, 3)
    }


def test_only_the_adapted_stack_is_filled(tmp_path: Path) -> None:
    text_only = Tiny(
        MODELS["llava"].build, r".*language_model.*\.[02]\..*(q|v)_proj", inputs="text-and-image"
    )
    model = get_peft_model(
        text_only.model(), msplora.MSPLoraConfig(target_modules=text_only.targets)
    )
    tensors, config = lora_of(model)
    assert not [name for name in tensors if "vision" in name]
    assert len(tensors) == 2 * 2 * 4
    assert len(config["target_modules"]) == 2 * 4
    assert all("language_model" in name for name in config["target_modules"])


def test_trained_tokens_survive(tmp_path: Path) -> None:
    adapter = save_adapter(
        MODELS["llama"], tmp_path, trainable_token_indices=[1, 2], task_type="CAUSAL_LM"
    )
    tensors = load_file(adapter / "adapter_model.safetensors")
    tokens = next(name for name in tensors if "token" in name)
    tensors[tokens] += 1
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    for convert in (msplora.to_lora, msplora.to_merged):
        result = convert(adapter, tmp_path / convert.__name__)
        assert result.comparison is not None
        assert result.comparison.difference <= 1e-5


def test_a_classifiers_head_survives(tmp_path: Path) -> None:
    adapter = save_adapter(MODELS["bert"], tmp_path, task_type="SEQ_CLS")
    tensors = load_file(adapter / "adapter_model.safetensors")
    head = "base_model.model.classifier.weight"
    tensors[head] += 1
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    result = msplora.to_lora(adapter, tmp_path / "lora")
    assert result.comparison is not None
    converted = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert torch.equal(converted[head], tensors[head])
    msplora.to_merged(adapter, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.classifier.weight, tensors[head])


@pytest.mark.parametrize("convert", [msplora.to_lora, partial(msplora.to_msplora, r=4)])
def test_a_card_loads_a_classifier_of_three_classes(tmp_path: Path, convert: Any) -> None:
    """PEFT gives the base two unless it is told."""
    adapter = save_adapter(MODELS["bert"], tmp_path, task_type="SEQ_CLS")
    file = tmp_path / "base" / "config.json"  # of a base that says nothing of classes
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: config[key] for key in config if "label" not in key}))
    convert(adapter, tmp_path / "out", verify=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "every LoRA server" not in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    found: dict[str, Any] = {}
    exec(snippet.replace("THIS FOLDER", str(tmp_path / "out")), found)
    assert found["model"].config.num_labels == 3


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([4, 2, 1], "every LoRA server load it as it is. vLLM is started with `--max-lora-rank 8`"),
        ([16, 8, 4], "--max-lora-rank 32"),
        ([512, 64, 32], "Not so every server (the LoRA has rank 608"),
    ],
)
def test_a_card_says_what_its_rank_asks_of_servers(ranks: list[int], said: str) -> None:
    config = {"r": sum(ranks), "task_type": "CAUSAL_LM", "base_model_name_or_path": None}
    assert said in card_of_lora(config, "adapter", {})
    other = card_of_lora(config | {"task_type": "SEQ_2_SEQ_LM"}, "adapter", {})
    assert "every LoRA server load" not in other


def test_dora_stays_dora(tmp_path: Path) -> None:
    adapter = save_adapter(MODELS["llama"], tmp_path, use_dora=True, task_type="CAUSAL_LM")
    msplora.to_lora(adapter, tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["use_dora"]


def test_the_merged_model_answers_like_the_adapted_one(adapter: Path, tmp_path: Path) -> None:
    expected = native_logits(adapter)
    result = msplora.to_merged(adapter, tmp_path / "merged")
    assert result.comparison is not None
    assert result.comparison.difference <= 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert not any("pyramid" in name for name, _ in merged.named_modules())


def test_a_merged_model_has_its_base_s_tokenizer_unless_the_adapter_has_one(
    adapter: Path, tmp_path: Path
) -> None:
    """PEFT saves none with an adapter, and without one transformers may make up an empty one."""
    names = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
    for name in names:
        (tmp_path / "base" / name).write_text('{"of": "base"}')
    msplora.to_merged(adapter, tmp_path / "merged", verify=False)
    (adapter / "tokenizer_config.json").write_text('{"of": "adapter"}')
    msplora.to_merged(adapter, tmp_path / "own", verify=False)
    for name in names:
        assert "base" in (tmp_path / "merged" / name).read_text()
    assert "adapter" in (tmp_path / "own" / "tokenizer_config.json").read_text()
    assert not (tmp_path / "own" / "tokenizer.json").exists()  # half of another one
    assert (tmp_path / "own" / "preprocessor_config.json").exists()


def test_a_hub_that_gives_no_tokenizer_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("msplora.companions.snapshot_download", offline)
    with pytest.warns(NoTokenizerWarning, match="'org/base' could not be asked"):
        complete_from_base("org/base", None, tmp_path)


def test_an_output_that_holds_something_is_kept(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="--force"):
        msplora.to_lora(adapter, out)
    # What is no earlier conversion is kept even with force: a run, a home folder, a thesis.
    for convert in (msplora.to_lora, msplora.to_merged):
        with pytest.raises(OutputError, match=r"holds mine\.txt"):
            convert(adapter, out, force=True)
    assert os.listdir(out) == ["mine.txt"]


def test_force_replaces_an_earlier_conversion_and_nothing_else(
    adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "lora"
    msplora.to_lora(adapter, out)
    written = sorted(os.listdir(out))
    assert written == ["README.md", "adapter_config.json", "adapter_model.safetensors", MARK]
    assert "needs no msplora" in (out / "README.md").read_text()
    with pytest.raises(OutputError, match="--force"):
        msplora.to_lora(adapter, out)
    msplora.to_lora(adapter, out, force=True, dtype="bfloat16")
    assert sorted(os.listdir(out)) == written
    tensors = load_file(out / "adapter_model.safetensors")
    assert {its.dtype for its in tensors.values()} == {torch.bfloat16}
    # Trained on, and saved in the same place, it is no earlier conversion any more.
    trained = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(trained, out / "adapter_model.safetensors", {"format": "pt"})
    for convert in (msplora.to_lora, msplora.to_merged):
        with pytest.raises(OutputError, match=r"adapter_model\.safetensors \(changed since\)"):
            convert(adapter, out, force=True)
    kept = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in trained.items())


def test_force_never_replaces_the_base_it_reads(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    msplora.to_merged(adapter, "merged", verify=False)
    before = (tmp_path / "merged" / "model.safetensors").read_bytes()
    for base in ("~/merged", "merged", str(tmp_path / "base" / ".." / "merged")):
        for convert in (msplora.to_lora, msplora.to_merged):
            with pytest.raises(OutputError, match="would replace"):
                convert(adapter, "~/merged", base=loading.BaseOptions(base), force=True)
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == before


def test_a_failed_check_writes_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        tensors, config = original(*args, **kwargs)
        return {name: tensor * 1.5 for name, tensor in tensors.items()}, config

    original = msplora.convert.lora_of  # pyright: ignore
    monkeypatch.setattr("msplora.convert.lora_of", wrong)
    (tmp_path / "lora").mkdir()
    with pytest.raises(VerificationError, match="Nothing was written"):
        msplora.to_lora(adapter, tmp_path / "lora")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "lora"]
    assert not os.listdir(tmp_path / "lora")


def test_a_full_disk_leaves_the_old_result(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "lora"
    msplora.to_lora(adapter, out)
    before = (out / "adapter_model.safetensors").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("msplora.forms.save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        msplora.to_lora(adapter, out, force=True)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "lora"]


def test_a_result_that_cannot_be_put_in_place_leaves_the_old_one(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "lora"
    out.mkdir()
    (out / MARK).write_text(json.dumps({"files": {}}))
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("no such luck")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", failing)
        with pytest.raises(OutputError, match="no such luck"):
            msplora.to_lora(adapter, out, force=True)
    assert os.listdir(out) == [MARK]
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "lora"]


@pytest.mark.slow
@pytest.mark.parametrize("killed_by", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_leaves_no_half_written_result(
    adapter: Path, tmp_path: Path, killed_by: signal.Signals
) -> None:
    script = f"""
import time
import msplora.convert
msplora.convert.prove_lora = lambda *_: print("checking", flush=True) or time.sleep(100)
msplora.to_lora({str(adapter)!r}, {str(tmp_path / "lora")!r})
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line == "checking\n" for line in process.stdout)
        process.send_signal(killed_by)
    assert not (tmp_path / "lora").exists()
    msplora.to_lora(adapter, tmp_path / "lora")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "lora"]


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".lora.old-x" / "lora").mkdir(parents=True)
    (tmp_path / ".lora.old-x" / "lora" / "precious").touch()
    with pytest.raises(OutputError, match="not empty"), new_folder(tmp_path / "lora"):
        pass
    assert os.listdir(tmp_path) == ["lora"]
    assert os.listdir(tmp_path / "lora") == ["precious"]


def test_two_at_once_leave_each_others_folder_alone(tmp_path: Path) -> None:
    def write_while_another_does() -> None:
        with new_folder(tmp_path / "lora") as late:
            (late / "late").touch()
            with new_folder(tmp_path / "lora") as quick:
                (quick / "quick").touch()
            assert late.exists()

    with pytest.raises(OutputError, match="not empty"):
        write_while_another_does()
    assert os.listdir(tmp_path) == ["lora"]
    assert os.listdir(tmp_path / "lora") == ["quick"]


@pytest.mark.parametrize("convert", [msplora.to_lora, msplora.to_merged])
def test_an_output_that_holds_the_adapter_or_its_base_is_refused(
    adapter: Path, tmp_path: Path, convert: Any
) -> None:
    for out in (adapter, tmp_path / "base", tmp_path):
        with pytest.raises(OutputError, match="would replace"):
            convert(adapter, out, force=True)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]
    assert (adapter / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("damage", ["truncate", "nan", "missing", "extra", "shape", "gone"])
@pytest.mark.parametrize("convert", [msplora.to_lora, msplora.to_merged])
def test_a_damaged_adapter_is_refused(
    adapter: Path, tmp_path: Path, damage: str, convert: Any
) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    if damage == "nan":
        tensors[name][0, 0] = float("nan")
    elif damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors[name.replace("q_proj", "k_proj")] = tensors[name].clone()
    elif damage == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, file, {"format": "pt"})
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-40])
    if damage == "gone":
        file.unlink()
    with pytest.raises(AdapterFileError):
        convert(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"base_model_name_or_path": 5}, "= 5; it has to be a path"), ({"r": "4"}, "TypeError")],
)
def test_a_config_of_other_types_is_told_in_one_line(
    adapter: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(str(tmp_path / "lora"))
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterFileError, match=said):
        msplora.to_msplora(tmp_path / "lora", tmp_path / "out", ranks=[4], groups=[0])


def test_an_adapter_of_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    llama(layers=5).save_pretrained(tmp_path / "deeper")  # pyright: ignore
    with pytest.raises(AdapterFileError, match="another base"):
        msplora.to_lora(
            adapter, tmp_path / "out", base=loading.BaseOptions(str(tmp_path / "deeper"))
        )


@pytest.mark.parametrize("source", ["nothing", "base"])
def test_a_folder_that_is_no_adapter_is_refused(adapter: Path, tmp_path: Path, source: str) -> None:
    with pytest.raises(MSPLoraError, match=r"no folder|no adapter"):
        msplora.to_lora(tmp_path / source, tmp_path / "out")
