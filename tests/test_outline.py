"""What a run finds wrong with its rows before it reads the weights of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from msplora.train.base_model import load_base
from msplora.train.data_classification import Classes
from msplora.train.end_tokens import end_tokens
from msplora.train.lengths import row_limit
from msplora.train.outline import outline
from msplora.train.settings_file import make_settings
from runs import config_on, msplora, save_bases, write_config, write_jsonl


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bases(tmp_path_factory.mktemp("outline"))


@pytest.mark.parametrize("task", ["sft", "classification"])
def test_an_outline_is_of_the_model_that_is_loaded(task: str, bases: Path) -> None:
    settings = make_settings(config_on(bases, task), "a test")
    classes = Classes(("text",), "label", ("a", "b", "c")) if task == "classification" else None
    its, base = outline(settings, classes), load_base(settings, classes)
    shapes = [
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for model in (its.model, base.model)
    ]
    assert shapes[0] == shapes[1]
    assert its.limit == row_limit(settings, base.model)
    generation = base.model.generation_config if classes is None else None
    assert its.ends == end_tokens(base.tokenizer, base.model.config, generation)


@pytest.mark.parametrize(
    ("task", "row", "changes", "said"),
    [
        ("sft", {"messages": [{"role": "user", "content": "w1"}]}, {}, "assistant"),
        (
            "sft",
            {"prompt": "w1", "completion": "w2 w3 w4"},
            {"max_length": 2, "too_long": "error"},
            "max_length",
        ),
        ("dpo", {"prompt": "w1", "chosen": "w2", "rejected": "w2"}, {}, "same"),
        (
            "classification",
            {"text": "w1 w2 w3", "label": "a"},
            {"max_length": 2, "too_long": "error"},
            "max_length",
        ),
    ],
)
def test_rows_are_found_wrong_without_the_weights(
    task: str, row: dict[str, Any], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    bases = save_bases(tmp_path)
    rows = [row | ({"label": "ab"[n % 2]} if "label" in row else {}) for n in range(8)]
    data = {"train": str(write_jsonl(tmp_path / "wrong.jsonl", rows)), **changes}
    config = config_on(bases, task, data=data)
    (Path(config["model"]) / "model.safetensors").unlink()
    result = msplora("train", write_config(tmp_path / "run.yaml", config))
    assert result.code == 1
    assert said in result.error
    assert "cannot load the model" not in result.error
