"""The card of a run: the size of what was saved, and the error that a program would really meet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from msplora.sisters import RankMover
from msplora.train.base_model import load_base
from msplora.train.data_classification import Classes
from msplora.train.methods import Adapted, adapt
from msplora.train.model_card import model_card
from msplora.train.saved_adapter import adapter_numbers
from msplora.train.settings import Settings
from msplora.train.settings_file import make_settings
from runs import config_on, save_bases, tensors

METRICS: dict[str, Any] = {"before": None, "evaluations": []}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bases(tmp_path_factory.mktemp("bases"))


def run_of(bases: Path, method: str, task: str = "sft") -> tuple[Settings, Adapted]:
    classifies = task == "classification"
    # Layers of two shapes: a rank that moves from one to another changes the size.
    targets = ["query", "output.dense"] if classifies else ["q_proj", "v_proj"]
    asked = config_on(bases, task, method=method, adapter={"target_modules": targets, "r": 4})
    settings = make_settings(asked, "a test")
    classes = Classes(("text",), "label", ("bad", "good")) if classifies else None
    return settings, adapt(load_base(settings, classes), settings)


def card_of(settings: Settings, adapted: Adapted, saved: int | None = None) -> str:
    return model_card(settings, adapted, METRICS, {}, Path("run"), saved)


@pytest.mark.parametrize(
    "method",
    [
        "msplora",
        pytest.param("hydra", marks=pytest.mark.slow),
        pytest.param("elalora", marks=pytest.mark.slow),
        "lora",
    ],
)
def test_the_error_it_names_is_the_one_that_comes(bases: Path, tmp_path: Path, method: str) -> None:
    settings, adapted = run_of(bases, method)
    card = card_of(settings, adapted)
    assert ("msplora.autoload enable" in card) is (method != "lora")
    if method == "lora":
        return
    adapted.model.save_pretrained(str(tmp_path))
    load = f"import peft; peft.PeftConfig.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['msplora'] = None; {load}"],
        capture_output=True,
        text=True,
        check=False,
    )
    error = done.stderr.strip().rpartition("\n")[2]
    assert error.startswith("KeyError")
    assert f"`{error}`" in card


@pytest.mark.parametrize("task", ["sft", "classification"])
def test_its_size_is_that_of_the_saved_adapter(bases: Path, tmp_path: Path, task: str) -> None:
    settings, adapted = run_of(bases, "elalora", task)
    at_the_start = adapted.trainable.adapter
    trained = [its for its in adapted.model.parameters() if its.requires_grad]
    mover = RankMover(adapted.model, torch.optim.SGD(trained), 100)
    widths = {path: its.in_features + its.out_features for path, its in mover.layers.items()}
    wide = mover.layers[max(widths, key=lambda path: widths[path])]
    narrow = mover.layers[min(widths, key=lambda path: widths[path])]
    generator = torch.Generator().manual_seed(0)
    mover.move(wide, [0], 0, generator)
    mover.move(narrow, [], 1, generator)
    adapted.model.save_pretrained(str(tmp_path))
    in_file = sum(its.numel() for its in tensors(tmp_path).values())
    saved = adapter_numbers(tmp_path, adapted.model.base_model.prefix)
    assert saved == in_file - adapted.trainable.head
    assert saved == at_the_start - (max(widths.values()) - min(widths.values())) < at_the_start
    card = card_of(settings, adapted, saved)
    assert f"| adapter | {saved:,} |\n| adapter, at the start | {at_the_start:,} |" in card
    assert "at the start" not in card_of(settings, adapted)
