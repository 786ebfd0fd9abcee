"""What a recipe for a GPU says of memory is what a dry run foresees of it, without the model."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers as hf
import yaml

from glue_files import write_glue
from msplora import recipes
from msplora.train.dry_run import dry_run
from msplora.train.settings_file import read_settings
from msplora.train.target import GIB
from runs import write_jsonl
from tiny_images import paint_folder, processor
from tiny_saved import CHAT_TEMPLATE, byte_tokenizer

RECIPES = {its.name: its for its in recipes.recipes() if its.name.endswith("1gpu")}
LONG = "words " * 400
"""More tokens than any recipe takes of a row: so every row is as long as can be."""

CONFIGS: dict[str, Any] = {
    "FacebookAI/roberta-base": lambda: hf.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1
    ),
    "google/vit-base-patch16-224-in21k": lambda: hf.ViTConfig(),
    "meta-llama/Llama-2-7b-hf": lambda: hf.LlamaConfig(max_position_embeddings=4096),
    "meta-llama/Llama-3.2-1B": lambda: hf.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=131072, rms_norm_eps=1e-5,
    ),
    "Qwen/Qwen3-0.6B": lambda: hf.Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        max_position_embeddings=40960,
    ),
}  # fmt: skip
"""The shapes of the models, as their config.json has them."""


# In CI what takes seconds; a 7B or a 0.6B with 151,936 words takes a minute.
IN_CI = {
    "roberta-base-mrpc-1gpu",
    "roberta-base-rte-1gpu",
    "vit-base-food101-1gpu",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in IN_CI else pytest.mark.thorough)
        for name in RECIPES
    ],
)
def test_the_head_says_what_a_dry_run_foresees(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "4bit" in name and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes (the quantised extra) is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    content = yaml.safe_load(RECIPES[name].text)
    furnish(content)
    foreseen = dry_run(read_settings(recipes.copy(name)), "80GB")
    said = re.match(r"([\d.]+) GiB of a GPU, foreseen", RECIPES[name].facts["Memory"])
    assert said
    assert float(said[1]) == pytest.approx(foreseen.needed / GIB, rel=0.05)


def furnish(content: dict[str, Any]) -> None:
    """The config of a recipe's model and rows as long as it takes them, but no weights."""
    model, data, training = Path(content["model"]), content["data"], content["training"]
    CONFIGS[content["model"]]().save_pretrained(model)
    count = max(training["batch_size"], training.get("eval_batch_size", 0))
    if content["task"] == "image-classification":
        processor(224).save_pretrained(model)
        for split in ("train", "validation"):
            paint_folder(Path(data["hub"], split), count)
        return
    tokenizer = byte_tokenizer(closing=content["task"] == "classification")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(model)
    if content["task"] == "classification":
        write_glue(Path(data["path"]), data["glue"], count, LONG)
        return
    # So many that an evaluation's batch is full.
    whole = math.ceil(count / data.get("validation_fraction", 1))
    rows = [
        {"prompt": f"Say {place}.", "chosen": LONG, "rejected": f"No. {LONG}"}
        if content["task"] == "dpo"
        else {"instruction": f"Say {place}.", "input": "", "output": LONG}
        for place in range(whole)
    ]
    Path(data["hub"]).mkdir(parents=True)
    for split in ("train", data.get("validation_split", "train")):
        write_jsonl(Path(data["hub"], f"{split}.jsonl"), rows)
