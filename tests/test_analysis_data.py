"""What `msplora analyse --data` measures: the losses of adapters in whose files a level is zero."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import msplora as library
from msplora.analysis.results import Ablation
from msplora.train import held_out_loss, saved_run
from msplora.train.evaluation import evaluate_run
from runs import answered_rows, config_on, msplora, save_bases, write_config, write_jsonl

WEIGHTS = "adapter/adapter_model.safetensors"


def trained(folder: Path, task: str, **changes: Any) -> tuple[Path, str]:
    """A run of a few steps, and rows for it."""
    bases = save_bases(folder)
    content = config_on(bases, task, output=str(folder / "run"), **changes)
    content["training"]["epochs"] = 2
    result = msplora("train", write_config(folder / "config.yaml", content))
    assert result.code == 0, result.error
    return folder / "run", content["data"]["train"]


def with_zeros(run: Path, folder: Path, *parts: str) -> Path:
    """A copy of a run in whose adapter every B of a name with one of `parts` is zero."""
    shutil.copytree(run, folder)
    tensors = load_file(folder / WEIGHTS)
    for key, tensor in tensors.items():
        if any(part in key for part in parts) and ("_B." in key):
            tensors[key] = torch.zeros_like(tensor)
    save_file(tensors, folder / WEIGHTS)
    return folder


def ablation(run: Path, data: str) -> Ablation:
    (found,) = library.analyse(run, data=Path(data)).adapters
    assert found.ablation is not None
    return found.ablation


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return trained(tmp_path_factory.mktemp("sft"), "sft")


def test_levels_of_a_language_model(language_model: tuple[Path, str], tmp_path: Path) -> None:
    run, data = language_model
    found = ablation(run, data)
    assert (found.unit, found.rows) == ("token", 40)
    levels = ("global", "mid", "local")
    pairs = (("global", "mid"), ("global", "local"), ("mid", "local"))
    assert [its.levels for its in found.runs] == [(), *((its,) for its in levels), *pairs, levels]
    for number, its in enumerate(found.runs):
        parts = [f".{level}/" for level in its.levels]
        copy = with_zeros(run, tmp_path / f"copy{number}", *parts)
        assert its.loss == pytest.approx(evaluate_run(copy, data)["loss"], abs=1e-6)
        assert its.change == pytest.approx(its.loss - found.runs[0].loss, abs=1e-9)
        assert its.low <= its.change <= its.high
    whole, *_, none = found.runs
    assert none.low > 0  # it was trained on these rows
    assert whole.low == whole.high == 0
    # Reading and measuring leaves the run as it was.
    assert ablation(run, data) == found


def test_rows_that_did_not_stay_whole_are_counted_as_eval_does(
    language_model: tuple[Path, str], tmp_path: Path
) -> None:
    run, _ = language_model
    rows = [*answered_rows(3), {"prompt": "w1", "completion": ""}]
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    (found,) = library.analyse(run, data=data).adapters
    assert found.ablation is not None
    report = evaluate_run(run, data)
    assert found.ablation.left_out == {"empty": report["empty"]} == {"empty": 1}
    (note,) = [note for note in found.notes if "whole" in note]
    assert note == (
        f"Not all rows of {tmp_path.name}/rows.jsonl are whole: 1 left out without an answer, or "
        f"with the same one twice."
    )


@pytest.mark.parametrize("start", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_plain_lora_of_preferences(start: bool, tmp_path: Path) -> None:
    """The model it is compared with, also an adapter, stays as it is."""
    rows = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " fox"}
        for row in answered_rows(12)
    ]
    data = str(write_jsonl(tmp_path / "pairs.jsonl", rows))
    changes: dict[str, Any] = {"method": "lora", "data": {"train": data}}
    if start:
        first, _ = trained(tmp_path, "sft", method="lora")
        changes["init_from"] = str(first.rename(tmp_path / "first"))
    run, _ = trained(tmp_path, "dpo", **changes)
    found = ablation(run, data)
    assert [its.levels for its in found.runs] == [(), ("lora",)]
    assert (found.unit, found.rows) == ("pair", 12)
    for its, parts in zip(found.runs, ([], ["lora"]), strict=True):
        copy = with_zeros(run, tmp_path / f"copy{len(parts)}", *parts)
        assert its.loss == pytest.approx(evaluate_run(copy, data)["loss"], abs=1e-5)
    assert found.runs[1].change > 1e-3


def test_no_more_logits_are_in_float32_than_in_an_evaluation(
    language_model: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = language_model
    expected, judge, sizes = ablation(run, data), F.cross_entropy, list[int]()

    def noted(scores: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        sizes.append(scores.numel())
        return judge(scores, *arguments, **named)

    monkeypatch.setattr(held_out_loss, "PIECE", 1000)
    monkeypatch.setattr(F, "cross_entropy", noted)
    found = ablation(run, data)
    assert 0 < max(sizes) <= 1000
    for one, other in zip(found.runs, expected.runs, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-6)


def test_what_is_not_there_is_missed_before_a_model_is_loaded(
    language_model: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = language_model

    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(saved_run, "load_base", loaded)
    nowhere = f"{data}.gone"
    for command in (("analyse", run), ("doctor", run.parent / "decoder", run)):
        result = msplora(*command, "--data", nowhere)
        assert result.code == 1
        assert f"the data file {nowhere} does not exist" in result.error
    for option in (["--intruders", "3"], ["--revision", "main"]):
        assert msplora("analyse", run, *option).code == 2


def test_options_of_the_base_reach_the_loader(
    language_model: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = language_model
    asked = []
    load = saved_run.load_base

    def watched(settings: Any, *rest: Any, **more: Any) -> Any:
        asked.append((settings.model, settings.revision, settings.trust_remote_code))
        return load(settings, *rest, **more)

    monkeypatch.setattr(saved_run, "load_base", watched)
    options = ["--data", data, "--revision", "main", "--trust-remote-code", "--json"]
    decoder = str(run.parent / "decoder")
    for more in ([], ["--base", decoder, "--intruders", "0"]):
        result = msplora("analyse", run, *options, *more)
        assert result.code == 0, result.error
    assert asked == [(decoder, "main", True)] * 2


def test_a_plain_lora_of_a_classifier_keeps_its_head(tmp_path: Path) -> None:
    options = {"train": str(tmp_path / "labelled.jsonl"), "max_length": 16}
    run, data = trained(tmp_path, "classification", method="lora", data=options)
    with open(data, "a") as rows:
        rows.write(json.dumps({"text": "w1 " * 500, "label": "good"}) + "\n")
    found = ablation(run, data)
    assert found.left_out == {"truncated": 1}
    assert [its.levels for its in found.runs] == [(), ("lora",)]
    assert found.unit == "row"
    for its, parts in zip(found.runs, ([], ["lora"]), strict=True):
        copy = with_zeros(run, tmp_path / f"copy{len(parts)}", *parts)
        assert its.loss == pytest.approx(evaluate_run(copy, data)["loss"], abs=1e-5)
