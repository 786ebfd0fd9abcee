"""A dry run on a quantised base foresees what the same steps take on the real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from msplora.train.base_model import base_without_weights, load_base
from msplora.train.dry_run import dry_run
from msplora.train.memory_trace import Held
from msplora.train.settings import Settings
from msplora.train.settings_file import make_settings
from msplora.train.weightless_quantised import scales
from runs import (
    answered_rows,
    labelled_rows,
    msplora,
    save_decoder,
    save_encoder,
    write_config,
    write_jsonl,
)

pytest.importorskip("bitsandbytes")


@pytest.fixture(autouse=True)
def same_kernels_on_every_processor() -> Iterator[None]:
    """oneDNN takes memory in passing for products in half precision, by the CPU's instructions."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    save_decoder(folder / "sft", layers=2, hidden_size=128, intermediate_size=256)
    save_encoder(folder / "classification", layers=2, hidden_size=128, intermediate_size=256)
    write_jsonl(folder / "sft.jsonl", answered_rows(32))
    write_jsonl(folder / "classification.jsonl", labelled_rows(32))
    return folder


def config(folder: Path, task: str = "sft", **changes: Any) -> dict[str, Any]:
    training = {"batch_size": 4, **changes.pop("training", {})}
    content: dict[str, Any] = {
        "model": str(folder / task),
        "task": task,
        "output": str(folder / "run"),
        "quantization": "4bit",
        "data": {"train": str(folder / f"{task}.jsonl")},
        "adapter": {"target_modules": "all-linear"},
        "training": training,
    }
    return content | changes


def settings_of(folder: Path, task: str = "sft", **changes: Any) -> Settings:
    return make_settings(config(folder, task, **changes), "test")


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "4 bits": ("sft", {}),
    "8 bits": ("sft", {"quantization": "8bit"}),
    "4 bits in half precision, checkpointed": (
        "sft", {"dtype": "bfloat16", "training": {"gradient_checkpointing": True}}
    ),
    "a classifier": ("classification", {}),
    "plain LoRA": ("sft", {"method": "lora"}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_what_is_measured(folder: Path, case: str) -> None:
    task, changes = CASES[case]
    found = dry_run(settings_of(folder, task, **changes), "cpu", real=True)
    assert found.measured
    assert found.estimate.training.total == pytest.approx(found.measured.training, rel=0.01)
    assert found.estimate.evaluation
    evaluated = found.measured.evaluation
    # Which kernel takes an 8-bit product, and what it keeps, is the CPU's choice.
    other_kernels = 2**16 if case == "8 bits" else 0
    assert found.estimate.evaluation.total == pytest.approx(evaluated, rel=0.03, abs=other_kernels)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_weights_and_scales_are_those_of_the_real_base(folder: Path, bits: str) -> None:
    settings = settings_of(folder, quantization=bits)
    with torch.device("meta"):
        without = base_without_weights(settings, None).model
    real = load_base(settings, None).model

    def shapes(model: Any) -> dict[str, tuple[Any, ...]]:
        return {
            name: (tuple(its.shape), its.dtype, type(its).__name__)
            for name, its in model.named_parameters()
        }

    assert shapes(without) == shapes(real)
    assert sum(its.nbytes for its in scales(without)) == sum(its.nbytes for its in scales(real))


@pytest.mark.thorough
def test_a_checkpoint_that_is_quantised_is_foreseen_alike(folder: Path, tmp_path: Path) -> None:
    asked = hf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "sft", quantization_config=asked)
    model.save_pretrained(tmp_path / "sft")
    hf.AutoTokenizer.from_pretrained(folder / "sft").save_pretrained(tmp_path / "sft")
    content = config(folder, model=str(tmp_path / "sft"), quantization=None)
    stored = dry_run(make_settings(content, "test"), "24GB")
    made = dry_run(settings_of(folder), "24GB")
    assert stored.estimate == made.estimate
    assert stored.trainable == made.trainable


@pytest.mark.thorough
def test_a_base_is_smaller_by_what_its_bits_say(folder: Path) -> None:
    frozen = {
        bits: dry_run(settings_of(folder, quantization=bits), "24GB").estimate.training.parts[
            Held.FROZEN
        ]
        for bits in (None, "8bit", "4bit")
    }
    assert frozen["4bit"] < frozen["8bit"] < frozen[None]
    assert frozen["4bit"] < 0.3 * frozen[None]


@pytest.mark.thorough
def test_the_real_base_can_be_loaded_after_a_dry_run(folder: Path) -> None:
    """bitsandbytes keeps its code books for the whole process."""
    dry_run(settings_of(folder), "24GB")
    base = load_base(settings_of(folder), None)
    words = torch.arange(8)[None]
    assert bool(base.model(input_ids=words).logits.isfinite().all())


def test_a_base_that_another_library_quantised_is_refused(folder: Path, tmp_path: Path) -> None:
    stored = json.loads((folder / "sft/config.json").read_text())
    stored["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "gptq").mkdir()
    (tmp_path / "gptq/config.json").write_text(json.dumps(stored))
    hf.AutoTokenizer.from_pretrained(folder / "sft").save_pretrained(tmp_path / "gptq")
    content = config(folder, model=str(tmp_path / "gptq"), quantization=None)
    result = msplora("train", write_config(tmp_path / "run.yaml", content), "--dry-run")
    assert result.code == 1
    assert "quantised by gptq" in result.error
