"""Every recipe says what it is, is a config, and trains: here two steps of a tiny random model."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from glue_files import TASKS, write_glue
from msplora import recipes
from msplora.train.settings_file import read_settings
from runs import msplora as command
from runs import write_jsonl
from tiny_images import paint_folder, save_vision_model
from tiny_saved import save_encoder, save_language_model

RECIPES = {recipe.name: recipe for recipe in recipes.recipes()}
HARDWARE = ("1gpu", "cpu")
ROWS = [
    {"instruction": f"Say {word}.", "input": "", "output": f"{word.title()}."}
    for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")
]
PAIRS = [{"prompt": row["instruction"], "chosen": row["output"], "rejected": "No."} for row in ROWS]


def test_the_recipes_cover_what_they_are_for() -> None:
    assert {f"roberta-base-{task}-1gpu" for task in TASKS} < RECIPES.keys()
    assert {"llama-2-7b-alpaca-1gpu", "llama-2-7b-alpaca-4bit-1gpu"} < RECIPES.keys()
    tasks = {read(name)["task"] for name in RECIPES}
    assert tasks == {"classification", "image-classification", "sft", "dpo"}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load(RECIPES[name].text)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_is(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    assert re.fullmatch(r"[a-z0-9.-]+-[a-z0-9]+-(1gpu|cpu)", name)
    assert all(recipe.facts[fact] for fact in recipes.FACTS)
    assert max(map(len, recipe.text.splitlines())) <= 120
    assert read_settings(recipes.copy(name, tmp_path)).method == "msplora"
    # What cannot be had where the recipes are made was not run there, and must not sound like it.
    if name.endswith("1gpu"):
        assert "not measured" in recipe.facts["Expected"]
        assert "not measured" in recipe.facts["Time"]


@pytest.mark.parametrize("task", TASKS)
def test_the_paper_s_set_up_is_the_paper_s(task: str, tmp_path: Path) -> None:
    name = f"roberta-base-{task}-1gpu"
    assert "the paper's claim, not measured" in RECIPES[name].facts["Expected"]
    settings = read_settings(recipes.copy(name, tmp_path))
    adapter, training = settings.adapter, settings.training
    assert (adapter.ranks, adapter.groups, adapter.alphas) == ([8, 4, 2], [1, 3, 0], [16] * 3)
    assert (adapter.lora_dropout, adapter.target_modules) == (0.05, ["query", "value"])
    epochs = {"mrpc": 30, "qnli": 25, "rte": 80, "sst2": 60, "stsb": 40, "cola": 80}
    assert (training.batch_size, training.epochs) == (64, epochs[task])
    assert training.learning_rate == (5e-4 if task == "sst2" else 4e-4)
    assert training.head_learning_rate_factor == 0.5
    assert (training.warmup_ratio, training.weight_decay) == (0.06, 0.1)
    assert settings.data.max_length == (512 if task == "rte" else 256)


def test_the_list_shows_all_and_copy_gives_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)
    listed = command("recipes")
    assert listed.code == 0
    for name, recipe in RECIPES.items():
        assert name in listed.out
        assert recipe.title in listed.out
    name = "minilm-mrpc-cpu"
    assert command("recipes", "copy", name).code == 0
    assert Path(f"{name}.yaml").read_text() == RECIPES[name].text
    assert "could not be written" in command("recipes", "copy", name, "/proc/mine.yaml").error
    assert command("recipes", "show", name).out == RECIPES[name].text
    again = command("recipes", "copy", name)
    assert again.code == 1
    assert "is not overwritten" in again.error
    assert command("recipes", "copy", name, "mine.yaml").code == 0
    assert Path("mine.yaml").read_text() == RECIPES[name].text
    misspelt = command("recipes", "copy", "minilm-mprc-cpu")
    assert misspelt.code == 1
    assert "minilm-mrpc-cpu" in misspelt.error
    nowhere = command("recipes", "copy", name, "no/folder/mine.yaml")
    assert nowhere.code == 1
    assert "is no folder" in nowhere.error


MEASURED = {
    row["recipe"]: row
    for row in map(
        json.loads,
        (Path(__file__).parents[1] / "benchmarks/results/recipes.jsonl").read_text().splitlines(),
    )
}


def test_every_small_recipe_has_been_run() -> None:
    assert MEASURED.keys() == {name for name in RECIPES if name.endswith("-cpu")}


@pytest.mark.parametrize("name", MEASURED)
def test_a_head_says_what_was_measured(name: str) -> None:
    facts, row = RECIPES[name].facts, MEASURED[name]
    metric = read(name)["training"].get("metric_for_best", "loss")
    shown = f"{row['best'][metric]:.{2 if read(name)['task'] == 'sft' else 3}f}"
    assert shown in facts["Expected"]
    assert "one seed" in facts["Expected"]
    assert facts["Memory"].startswith(f"{row['resident_mib'] / 1024:.1f} GiB")
    minutes = re.match(r"(half a|\d+)( and a half)? minutes? on two cores", facts["Time"])
    assert minutes
    said = 0.5 if minutes[1] == "half a" else int(minutes[1]) + (0.5 if minutes[2] else 0)
    assert said == pytest.approx(row["seconds"] / 60, abs=0.3)


def test_a_head_that_lacks_something_is_seen() -> None:
    with pytest.raises(ValueError, match="the head of recipe x says"):
        recipes.parse("x", "# A title\n#\n# Needs: nothing\n\nmodel: a\n")


def furnish(content: dict[str, Any]) -> None:
    """Put a tiny model and tiny data where a recipe says that its own are."""
    model, data = Path(content["model"]), content["data"]
    if content["task"] == "image-classification":
        save_vision_model(model)
        for split in ("train", "validation"):
            paint_folder(Path(data["hub"], split), 4)
    elif content["task"] == "classification":
        save_encoder(model)
        write_glue(Path(data["path"]), data["glue"])
    else:
        save_language_model(model, chats=True, positions=1024)
        rows = PAIRS if content["task"] == "dpo" else ROWS
        if "train" in data:
            Path(data["train"]).write_text(json.dumps(rows * 4))
        else:
            Path(data["hub"]).mkdir(parents=True)
            for split in ("train", data.get("validation_split", "train")):
                write_jsonl(Path(data["hub"], f"{split}.jsonl"), rows * 8)


@pytest.mark.parametrize(
    "name",
    [  # In CI the small ones; those for a GPU by hand, as the whole has to end in 20 minutes.
        pytest.param(name, marks=pytest.mark.slow if name.endswith("cpu") else pytest.mark.thorough)
        for name in RECIPES
    ],
)
def test_a_recipe_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    furnish(read(name))
    if "4bit" in name and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes (the quantised extra) is not installed")
    steps = 2 * len(read(name)["training"].get("stages", [0]))
    flags = [
        f"--set=training.{key}={value}"
        for key, value in {
            "max_steps": steps,
            "batch_size": 2,
            "gradient_accumulation": 1,
            "eval_steps": steps,
            "optimizer": "adamw_torch",  # the paged one needs a GPU
        }.items()
    ]
    file = recipes.copy(name)
    done = command("train", file, *flags, "--output", "run")
    assert done.code == 0, done.err
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["best"]["step"] == steps
    assert metrics["reloaded"]["loss"] == pytest.approx(metrics["best"]["loss"], rel=1e-3)
