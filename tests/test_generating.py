"""transformers' `generate` and `pipeline` with an adapter: as the merged model, word for word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from torch import Tensor

from adapted_llama import config
from oracle import randomise
from runs import save_decoder

PROMPTS = ["w1 w2 w3", "w4 w5 w6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, an adapter of it, and the two merged."""
    folder = tmp_path_factory.mktemp("generating")
    save_decoder(folder / "base")
    model = adapted(folder)
    model.save_pretrained(folder / "adapter")
    tokenizer(folder).save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    tokenizer(folder).save_pretrained(folder / "merged")
    return folder


def tokenizer(folder: Path) -> Any:
    found = hf.AutoTokenizer.from_pretrained(folder / "base")
    found.pad_token = found.eos_token
    return found


def load(folder: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder).eval()


def adapted(folder: Path) -> Any:
    model = get_peft_model(load(folder / "base"), config(task_type="CAUSAL_LM")).eval()
    randomise(model)
    return model


def continued(model: Any, folder: Path, **options: Any) -> Tensor:
    batch = tokenizer(folder)(PROMPTS, return_tensors="pt")
    batch.pop("token_type_ids", None)
    return model.generate(**batch, max_new_tokens=12, min_new_tokens=12, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": True, "temperature": 0.8},
    ],
    ids=["greedy", "beams", "static cache", "sampled"],
)
def test_with_a_cache_it_continues_as_without_and_as_the_merged_model(
    options: dict[str, Any], folder: Path
) -> None:
    model = adapted(folder)
    found = []
    for judged, cached in ((model, True), (model, False), (load(folder / "merged"), True)):
        torch.manual_seed(5)
        more = options if cached else {**options, "cache_implementation": None, "use_cache": False}
        found.append(continued(judged, folder, **more))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    torch.manual_seed(5)
    assert not torch.equal(found[0], continued(load(folder / "base"), folder, **options))


def test_each_row_of_a_batch_is_continued_by_its_own_adapter(folder: Path) -> None:
    model = adapted(folder)
    alone = continued(model, folder, do_sample=False)
    with model.disable_adapter():
        without = continued(model, folder, do_sample=False)
    mixed = continued(model, folder, do_sample=False, adapter_names=["__base__", "default"])
    assert torch.equal(mixed[0], without[0])
    assert torch.equal(mixed[1], alone[1])
    assert not torch.equal(alone[0], without[0])


@pytest.mark.parametrize("source", ["live", "folder"])
def test_a_pipeline(source: str, folder: Path) -> None:
    model = adapted(folder) if source == "live" else str(folder / "adapter")
    written = [
        hf.pipeline("text-generation", model=its, tokenizer=tokenizer(folder))(
            PROMPTS, max_new_tokens=8, do_sample=False
        )
        for its in (model, load(folder / "merged"))
    ]
    assert written[0] == written[1]
