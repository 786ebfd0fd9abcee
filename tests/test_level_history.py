"""What a run records of its levels, checkpoint by checkpoint, and `msplora analyse` then shows."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import msplora as library
from adapted_llama import LLAMA, adapted
from msplora.analysis.history import checkpoint, read_record
from msplora.errors import AdapterFileError, MSPLoraError
from msplora.train.level_history import LevelHistory
from msplora.train.settings import Settings
from runs import config_on, msplora, save_bases, write_config


def history(run: Path) -> Any:
    (found,) = library.analyse(run).adapters
    return found.history


def test_a_finished_run_has_the_history_of_its_checkpoints(tmp_path: Path) -> None:
    bases = save_bases(tmp_path)
    training = {"epochs": 3, "learning_rate": 1e-3}  # the loss falls: the last checkpoint is kept
    content = config_on(bases, output=str(tmp_path / "run"), training=training)
    result = msplora("train", write_config(tmp_path / "config.yaml", content))
    assert result.code == 0, result.error
    run = tmp_path / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    (found,) = library.analyse(run).adapters
    assert [its.step for its in found.history] == [its["step"] for its in metrics["evaluations"]]
    by_step = {its.step: its for its in found.history}
    assert by_step[metrics["best"]["step"]].levels == found.levels
    assert len({its.levels[0].norm for its in found.history}) == 3
    assert found.history[0].coarser_columns is not None
    assert "Over training" in library.analyse(run).to_html()

    record = run / "levels.json"
    record.write_text(record.read_text()[:-20])
    with pytest.raises(MSPLoraError, match="is no record of a run's levels"):
        library.analyse(run)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", '"a"', "null", "[]"])
@pytest.mark.parametrize("field", ["step", "norm", "rank"])
def test_a_record_of_what_is_no_number_is_none(field: str, value: str, tmp_path: Path) -> None:
    level = {"level": "lora", "norm": 1.0, "share": None, "effective_rank": 1, "stable_rank": 1.0}
    point = {"step": 5, "levels": [level | {"rank": 2}], "coarser_columns": None}
    text = json.dumps([point | {"coarser_rows": 0.5}])
    (tmp_path / "levels.json").write_text(text)
    assert len(read_record(tmp_path)) == 1
    (tmp_path / "levels.json").write_text(re.sub(rf'("{field}": )[\d.]+', rf"\g<1>{value}", text))
    with pytest.raises(MSPLoraError, match="is no record of a run's levels"):
        read_record(tmp_path)


def test_what_a_killed_process_did_not_record_is_made_up_for(tmp_path: Path) -> None:
    model, checkpoints = adapted(), tmp_path / "checkpoints"
    for step in (5, 10):
        with torch.no_grad():
            for _, b, _ in library.factors(model).values():
                b.mul_(2)
        model.save_pretrained(checkpoints / f"checkpoint-{step}")
    said: list[str] = []
    recorder = LevelHistory(checkpoints, settings(tmp_path), said.append)
    recorder.on_train_begin(None, state(0), None)
    assert not (checkpoints / "levels.json").exists()
    recorder.on_train_begin(None, state(5), None)
    recorder.on_save(None, state(10), None)
    recorder.on_save(None, state(10), None)  # the end of an epoch, and a stop
    expected = tuple(checkpoint(checkpoints / f"checkpoint-{step}") for step in (5, 10))
    assert history(tmp_path) == expected
    for step in (5, 10):  # the record stays when checkpoints go
        (checkpoints / f"checkpoint-{step}").rename(tmp_path / f"{step}")
    model.save_pretrained(checkpoints / "checkpoint-20")
    assert history(tmp_path)[:2] == expected
    assert [its.step for its in history(tmp_path)] == [5, 10, 20]
    assert not said


def test_what_the_file_alone_does_not_tell_ends_the_record_and_not_the_run(tmp_path: Path) -> None:
    model = adapted(levels=["all"], ranks=[4], groups=[1], alphas=[8])
    model.save_pretrained(tmp_path / "checkpoints/checkpoint-5")
    said: list[str] = []
    recorder = LevelHistory(tmp_path / "checkpoints", settings(tmp_path), said.append)
    for _ in range(2):
        recorder.on_save(None, state(5), None)
    assert len(said) == 1
    assert said[0].startswith("the levels are not followed over training: ")
    assert not (tmp_path / "checkpoints/levels.json").exists()
    model.get_base_model().save_pretrained(tmp_path / "base")
    recorder = LevelHistory(tmp_path / "checkpoints", settings(tmp_path), said.append)
    recorder.on_save(None, state(5), None)
    assert [its["step"] for its in json.loads((tmp_path / "checkpoints/levels.json").read_text())]


def settings(folder: Path) -> Settings:
    return Settings(
        model=str(folder / "base"), task="sft", output="run", data={"train": "rows.jsonl"}
    )  # pyright: ignore[reportArgumentType]


def state(step: int) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, is_world_process_zero=True)


def test_checkpoints_are_followed(tmp_path: Path) -> None:
    model = adapted()
    run = tmp_path / "run"
    for step in (5, 10, 100):
        with torch.no_grad():
            for address, (_, b, _) in library.factors(model).items():
                b.mul_(2 if address.startswith("local") else 1)
        model.save_pretrained(run / f"checkpoints/checkpoint-{step}")
    (found,) = library.analyse(run).adapters  # the last one stands for the run
    assert [its.step for its in found.history] == [5, 10, 100]
    assert found.history[-1].levels == found.levels
    norms = [its.levels[2].norm for its in found.history]
    np.testing.assert_allclose(norms, [norms[0], 2 * norms[0], 4 * norms[0]])
    assert len({its.levels[0].norm for its in found.history}) == 1
    np.testing.assert_allclose(
        found.history[-1].coarser_columns, found.inside_coarser("local")[0], rtol=1e-9
    )


def test_checkpoints_of_an_earlier_run_are_left_out(tmp_path: Path) -> None:
    """A LoRA was trained in the folder before: its checkpoints have one level."""
    lora: Any = get_peft_model(LLAMA.model(), LoraConfig(target_modules=["q_proj"]))
    model = adapted()
    for step in (7, 9):
        lora.save_pretrained(tmp_path / f"checkpoint-{step}")
    for step in (5, 10):
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    model.save_pretrained(tmp_path)
    found = library.analyse(tmp_path)
    (its,) = found.adapters
    assert [one.step for one in its.history] == [5, 10]
    assert any("2 checkpoint(s) have other levels" in note for note in its.notes)
    assert any("step 7 (lora of rank 8 and scale 1)" in note for note in its.notes)
    assert "Over training" in found.to_html()
    shutil.rmtree(tmp_path / "checkpoint-5")
    (its,) = library.analyse(tmp_path).adapters
    assert its.history == ()  # one is no course
    assert any("2 checkpoint(s) have other levels" in note for note in its.notes)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 8},
        {"r": 2},
        {"target_modules": ["v_proj"]},
        {"target_modules": ["q_proj", "v_proj"]},
        {"lora_alpha": 64},
        {"use_rslora": True},
        {"alpha_pattern": {r".*\.0\..*": 2}},
    ],
)
def test_checkpoints_of_another_lora_are_left_out(changes: dict[str, Any], tmp_path: Path) -> None:
    """Every LoRA has the one level: its ranks, scales and weights tell."""
    config: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"]}
    for of_step, folder in ((config, ""), (config | changes, "checkpoint-5"), (config, "")):
        lora: Any = get_peft_model(LLAMA.model(), LoraConfig(**of_step))
        lora.save_pretrained(tmp_path / folder)
    for step in (10, 20):
        lora.save_pretrained(tmp_path / f"checkpoint-{step}")
    (its,) = library.analyse(tmp_path).adapters
    assert [one.step for one in its.history] == [10, 20]
    note = its.notes[0]
    assert note.startswith("1 checkpoint(s) have other levels, ranks, scales or weights")
    # As of one that PEFT converted from PiSSA, of half the rank.
    assert ("or of before a conversion" in note) == (changes == {"r": 2})


def test_what_is_recorded_of_other_ranks_is_left_out(tmp_path: Path) -> None:
    model = adapted(r=4)
    recorder = LevelHistory(tmp_path, settings(tmp_path), lambda _: None)
    for step, of_step in ((5, adapted(r=8)), (10, model), (20, model)):
        of_step.save_pretrained(tmp_path / f"checkpoint-{step}")
        recorder.on_save(None, state(step), None)
    (its,) = library.analyse(tmp_path).adapters
    assert [one.step for one in its.history] == [10, 20]


def test_a_checkpoint_that_cannot_be_read_is_left_out_and_said(tmp_path: Path) -> None:
    """The adapter may be whole: of a run that diverged the best one was kept."""
    model = adapted()
    for step in (5, 10, 15, 20, 25):
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    model.save_pretrained(tmp_path)
    (tmp_path / "checkpoint-5/adapter_model.safetensors").write_bytes(b"cut")
    for step, value in ((10, float("nan")), (15, 1e200)):
        file = tmp_path / f"checkpoint-{step}/adapter_model.safetensors"
        tensors = {name: its.double() for name, its in load_file(file).items()}
        save_file({name: its.fill_(value) for name, its in tensors.items()}, file)
    found = library.analyse(tmp_path)
    (its,) = found.adapters
    assert [one.step for one in its.history] == [20, 25]
    (note,) = [note for note in its.notes if "cannot be shown" in note]
    assert note.startswith("3 checkpoint(s) cannot be shown over training, such as that of step 5:")
    assert "cannot be read" in note
    found.to_json()
    (tmp_path / "checkpoint-25").rename(tmp_path / "away")
    (its,) = library.analyse(tmp_path).adapters
    assert its.history == ()


def test_a_folder_of_checkpoints_is_the_last_that_is_whole(tmp_path: Path) -> None:
    """The process may have been killed while it saved one."""
    model = adapted()
    for step in (5, 10, 15):
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    files = [tmp_path / f"checkpoint-{step}/adapter_model.safetensors" for step in (15, 5, 10)]
    files[0].write_bytes(files[0].read_bytes()[:1000])
    (its,) = library.analyse(tmp_path).adapters
    assert its.notes[0] == "It is analysed as of step 10: no later checkpoint is whole."
    assert [one.step for one in its.history] == [5, 10]
    assert any("such as that of step 15: " in note for note in its.notes)
    files[1].unlink()
    files[2].unlink()
    with pytest.raises(AdapterFileError, match="checkpoint-15"):
        library.analyse(tmp_path)
