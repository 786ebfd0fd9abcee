"""Runs on a base in 4 or 8 bits, and what is refused where that cannot be."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

from msplora.train.base_model import load_base
from msplora.train.held_out_loss import autocast
from msplora.train.methods import adapt
from msplora.train.settings_file import make_settings, read_settings
from runs import (
    Result,
    answered_rows,
    labelled_rows,
    save_decoder,
    save_encoder,
    tensors,
    tree,
    write_config,
    write_jsonl,
)
from runs import msplora as command

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, and rows of each task."""
    folder = tmp_path_factory.mktemp("quantised")
    save_decoder(folder / "base", hidden_size=64, intermediate_size=128)
    save_encoder(folder / "encoder", hidden_size=64, intermediate_size=128)
    write_jsonl(folder / "train.jsonl", answered_rows(COUNT))
    write_jsonl(folder / "labelled.jsonl", labelled_rows(COUNT))
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " w0 w1"}
        for row in answered_rows(COUNT)
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder


def config(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    training = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "logging_steps": 1}
    content: dict[str, Any] = {
        "model": str(folder / "base"),
        "task": "sft",
        "output": str(folder / name),
        "quantization": "4bit",
        "data": {"train": str(folder / "train.jsonl"), "validation_fraction": 0.25},
        "adapter": {"target_modules": "all-linear"},
        "training": training | changes.pop("training", {}),
    }
    return content | changes


def train(folder: Path, name: str, **changes: Any) -> Result:
    file = write_config(folder / f"{name}.yaml", config(folder, name, **changes))
    result = command("train", file)
    assert result.code == 0, result.err
    return result


def best(run: Path) -> Any:
    return json.loads((run / "metrics.json").read_text())["best"]


TASKS: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "8 bits": {"quantization": "8bit"},
    "recomputed": {"training": {"gradient_checkpointing": True}},
    "lora": {"method": "lora"},
    "bfloat16": {"dtype": "bfloat16"},
    "dpo": {"task": "dpo", "data": {"train": "pairs.jsonl"}},
    "classification": {
        "task": "classification",
        "model": "encoder",
        "data": {"train": "labelled.jsonl"},
        "training": {"epochs": 12},
    },
}


@needs_bitsandbytes
@pytest.mark.parametrize(
    "case",
    [
        case if case in ("4 bits", "dpo") else pytest.param(case, marks=pytest.mark.slow)
        for case in TASKS
    ],
)
def test_a_run_on_a_quantised_base_learns_and_comes_back(
    folder: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    name = case.replace(" ", "-")
    printed = train(folder, name, **TASKS[case]).out
    bits = TASKS[case].get("quantization", "4bit")
    assert f"the base is quantised: {bits}" in printed
    metrics = json.loads((folder / name / "metrics.json").read_text())
    assert metrics["best"]["loss"] < metrics["before"]["loss"]
    result = command("eval", folder / name, "--json")
    assert result.code == 0, result.err
    assert result.json()["loss"] == pytest.approx(metrics["best"]["loss"], rel=1e-4)
    saved = tensors(folder / name / "adapter")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    trained = [tensor for key, tensor in saved.items() if "classifier" not in key]
    assert all(bool(tensor.any()) for tensor in trained)
    # Rounded to bfloat16 as they were trained, the low halves would be empty.
    assert any(not torch.equal(its, its.bfloat16().float()) for its in trained)


@needs_bitsandbytes
def test_the_base_is_what_bitsandbytes_makes_of_it(folder: Path) -> None:
    settings = make_settings(config(folder, "never", dtype="bfloat16"), "here")
    base = load_base(settings, None).model
    kinds = {type(its).__name__ for its in base.modules() if "Linear" in type(its).__name__}
    assert kinds == {"Linear4bit", "Linear"}
    assert type(base.lm_head).__name__ == "Linear"
    layer = base.model.layers[0].mlp.up_proj
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype == torch.bfloat16
    plain = hf.AutoModelForCausalLM.from_pretrained(folder / "base")
    assert base.num_parameters() == plain.num_parameters()


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_flow_through_the_base_after_an_evaluation_too(folder: Path, dtype: str) -> None:
    """They are those of a plain model with the weights that the rounding left."""
    settings = make_settings(config(folder, "never", dtype=dtype), "here")
    ids = torch.randint(3, 50, (2, 8), generator=torch.Generator().manual_seed(1))
    found = []
    for plain in (False, True):
        base = load_base(settings, None)
        if plain:
            base.model = base.model.dequantize().float()
        torch.manual_seed(0)
        model = adapt(base, settings).model
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not bool(parameter.any()):
                torch.manual_seed(len(name))
                torch.nn.init.normal_(parameter, std=0.02)
        with torch.no_grad():
            model.eval()(ids)
        with autocast("cpu", torch.float32 if plain else base.arithmetic):
            model.train()(ids, labels=ids).loss.backward()
        found.append({k: its.grad for k, its in model.named_parameters() if its.requires_grad})
    few, whole = found
    for name, gradient in whole.items():
        off = (few[name] - gradient).norm() / gradient.norm()
        assert off < (1e-3 if dtype == "float32" else 0.1), name


@needs_bitsandbytes
def test_the_numbers_are_those_of_the_whole_weights(folder: Path) -> None:
    train(folder, "counted", training={"max_steps": 1})
    train(folder, "whole", quantization=None, training={"max_steps": 1})
    plans = [json.loads((folder / it / "plan.json").read_text()) for it in ("counted", "whole")]
    assert plans[0] == plans[1]


@pytest.mark.slow
@needs_bitsandbytes
def test_the_other_verbs_and_the_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    train(folder, "used")
    run = folder / "used"
    result = command("generate", run, "--prompt", "w1 w2", "--max-new-tokens", 3)
    assert result.code == 0, result.err
    result = command("predict", run, folder / "train.jsonl", "--json", "--max-new-tokens", 2)
    assert len(result.out.splitlines()) == COUNT
    for to in ("lora", "merged"):
        result = command("convert", run, folder / f"as-{to}", "--to", to)
        assert result.code == 0, result.err
    # Into the whole weights, which the run only rounded in memory.
    merged = hf.AutoModelForCausalLM.from_pretrained(folder / "as-merged").eval()
    base = hf.AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    adapted = peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)
    code = (run / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    exec(code.replace('"adapter"', repr(str(run / "adapter"))), found)
    assert found["model"].get_base_model().is_loaded_in_4bit


@needs_bitsandbytes
@pytest.mark.slow
def test_a_checkpoint_that_is_quantised_already_is_trained_as_it_is(folder: Path) -> None:
    quantised = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=quantised)
    model.save_pretrained(folder / "small")
    hf.AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "small")
    before = tree(folder / "small")
    changes: dict[str, Any] = {"model": str(folder / "small"), "quantization": None}
    printed = train(folder, "on-small", **changes).out
    assert "the base is quantised: as it was published" in printed
    found = command("eval", folder / "on-small", "--json").json()
    assert found["loss"] == pytest.approx(best(folder / "on-small")["loss"], rel=1e-4)
    assert tree(folder / "small") == before
    for change, said in (
        ({"quantization": "4bit"}, "are quantised already (bitsandbytes)"),
        (
            {"method": "full"},
            "are quantised (bitsandbytes), and msplora trains on such with method msplora, lora",
        ),
    ):
        file = write_config(folder / "c.yaml", config(folder, "never", **changes | change))
        result = command("train", file)
        assert result.code == 1
        assert said in result.error
    result = command("convert", folder / "on-small", folder / "no", "--to", "merged")
    assert "--allow-quantized" in result.error
    assert not (folder / "no").exists()


def test_a_quantised_checkpoint_is_recognised_by_its_config(tmp_path: Path) -> None:
    """Of any kind, and before its weights are read, or the library for it is needed."""
    save_decoder(tmp_path / "base")
    content = json.loads((tmp_path / "base/config.json").read_text())
    content["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "base/config.json").write_text(json.dumps(content))
    write_jsonl(tmp_path / "train.jsonl", answered_rows(8))
    for change, said in (
        (
            {"method": "full", "quantization": None},
            "are quantised (gptq), and msplora trains on such with method msplora, lora,",
        ),
        ({}, "are quantised already (gptq)"),
    ):
        file = write_config(tmp_path / "c.yaml", config(tmp_path, "never", **change))
        result = command("train", file)
        assert result.code == 1
        assert said in result.error
        assert not list(tmp_path.glob("never*"))


@pytest.mark.parametrize("method", ["full", "frozen", "adalora", "randlora"])
def test_a_method_that_does_not_train_in_bits_here_is_refused(folder: Path, method: str) -> None:
    changes = {"method": method, "task": "classification"}
    file = write_config(folder / "c.yaml", config(folder, "never", **changes))
    result = command("train", file)
    assert result.code == 1
    assert (
        "msplora trains on a base in 4bit with method msplora, lora, dora, rslora, hydra, elalora, "
        f"and the method is {method!r}" in result.error
    )


def test_a_missing_library_is_named_with_its_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # an import of it fails now
    file = write_config(folder / "c.yaml", config(folder, "never"))
    result = command("train", file)
    assert result.code == 1
    assert "needs bitsandbytes" in result.error
    assert "pip install -e '.[quantised]' in msplora's clone" in result.error
    assert not list(folder.glob("never*"))


def test_bits_are_named_as_the_settings_name_them(folder: Path) -> None:
    file = write_config(folder / "c.yaml", config(folder, "never", quantization="4-bit"))
    result = command("train", file)
    assert result.code == 1
    assert "Did you mean '4bit'?" in result.error
    good = read_settings(write_config(folder / "c.yaml", config(folder, "never")))
    assert good.quantization == "4bit"
