"""`msplora train` treats the levels differently where it is told to, and tells trackers of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from msplora.train.rehearsal import rehearsed
from msplora.train.settings_file import make_settings
from runs import (
    Result,
    answered_rows,
    config_on,
    same,
    save_bases,
    tensors,
    write_config,
    write_jsonl,
)
from runs import msplora as command
from test_train_folder import stop_at


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(bases: Path, *flags: object, **changes: Any) -> Result:
    """A run of 9 steps."""
    training = {"max_steps": 9} | changes.pop("training", {})
    content = config_on(bases, training=training, **changes)
    return command("train", write_config(Path("config.yaml"), content), *flags)


def read_json(file: str) -> Any:
    return json.loads(Path(file).read_text())


def logged(run: str) -> list[dict[str, Any]]:
    return [entry for entry in read_json(f"{run}/log_history.json") if "loss" in entry]


def gradients(entry: dict[str, Any]) -> set[str]:
    prefix = "gradient_norm/"
    return {key.removeprefix(prefix) for key in entry if key.startswith(prefix)}


@pytest.mark.parametrize("task", ["sft", pytest.param("classification", marks=pytest.mark.slow)])
def test_stages_and_a_resumed_run(bases: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    options: dict[str, Any] = {
        "task": task,
        "training": {"stages": ["global", ["mid", "local"]], "eval_steps": 2},
    }
    straight = train(bases, "--output", "straight", **options)
    assert straight.code == 0, straight.err
    assert "stage 1 of 2: global until step 4" in straight.out
    assert "stage 2 of 2: mid and local until step 9" in straight.out
    levels = [gradients(entry) for entry in logged("straight")]
    assert levels == [{"global"}] * 4 + [{"mid", "local"}] * 5
    stop_at(monkeypatch, 7)
    assert train(bases, **options).code != 0
    resumed = train(bases, "--resume", **options)
    assert resumed.code == 0, resumed.err
    assert same(tensors(Path("straight/adapter")), tensors(Path("run/adapter")))
    ours = ("step", "loss", "learning_rate", "norm/", "gradient_norm/")
    kept = [
        [{key: its for key, its in entry.items() if key.startswith(ours)} for entry in logged(run)]
        for run in ("straight", "run")
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("asked", ["stages", "frozen_levels"])
def test_under_dpo_which_turns_the_adapter_off_for_its_reference(bases: Path, asked: str) -> None:
    """PEFT lets all of an adapter train again where it is turned on: here in every batch."""
    levels = ["global"] if asked == "stages" else ["mid", "local"]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " w7 w8"}
        for row in answered_rows(40)
    ]
    found = train(
        bases,
        task="dpo",
        data={"train": str(write_jsonl(Path("pairs.jsonl"), pairs))},
        training={asked: levels, "gradient_accumulation": 2, "batch_size": 4, "max_steps": 4},
    )
    assert found.code == 0, found.err
    assert all(gradients(entry) == {"global"} for entry in logged("run"))
    for name, tensor in tensors(Path("run/adapter")).items():
        if name.endswith("msplora_B.factor"):
            assert bool(tensor.any()) is ("store.global/" in name)


def test_frozen_levels_stay_what_they_were(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(bases, "--output", "first").code == 0
    second: dict[str, Any] = {
        "init_from": "first",
        "training": {"frozen_levels": ["global", "mid"], "eval_steps": 2},
    }
    stop_at(monkeypatch, 5)  # PEFT thaws what it loads, and a resumed run loads
    assert train(bases, **second).code != 0
    found = train(bases, "--resume", **second)
    assert found.code == 0, found.err
    assert "stage" not in found.out
    assert all(gradients(entry) == {"local"} for entry in logged("run"))
    first, run = tensors(Path("first/adapter")), tensors(Path("run/adapter"))
    assert {name for name in first if not torch.equal(first[name], run[name])} == {
        name for name in first if "store.local/" in name
    }
    trained = sum(run[name].numel() for name in run if "store.local/" in name)
    assert read_json("run/plan.json")["trainable"] == trained


@pytest.mark.slow
def test_rates_of_levels_and_of_b(bases: Path) -> None:
    factors = {"level_learning_rate_factors": {"local": 3.0}, "b_learning_rate_factor": 2.0}
    once: dict[str, Any] = {
        "max_steps": 1,
        "warmup_ratio": 0,
        "optimizer": "sgd",
        "max_grad_norm": 0,
    }
    start = {"init_lora_weights": False}
    for output, options in (("zero", {"learning_rate": 1e-30}), ("plain", {}), ("fast", factors)):
        found = train(bases, "--output", output, adapter=start, training=once | options)
        assert found.code == 0, found.err
    zero, plain, fast = (tensors(Path(run) / "adapter") for run in ("zero", "plain", "fast"))
    for name, was in zero.items():
        factor = (3.0 if "store.local/" in name else 1.0) * (2.0 if "msplora_B" in name else 1.0)
        moved = plain[name] - was
        assert moved.abs().max() > 0
        torch.testing.assert_close(fast[name] - was, factor * moved, rtol=2e-2, atol=1e-6)


@pytest.mark.slow
def test_early_stopping(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a hopeless rate nothing gets better after the first evaluation."""
    options: dict[str, Any] = {
        "training": {"learning_rate": 3.0, "eval_steps": 1, "early_stopping_patience": 3}
    }
    options["training"]["warmup_ratio"] = 0
    assert train(bases, "--output", "straight", **options).code == 0
    steps = [entry["step"] for entry in read_json("straight/metrics.json")["evaluations"]]
    best = read_json("straight/metrics.json")["best"]["step"]
    assert steps == list(range(1, best + 4))
    assert len(steps) < 9
    stop_at(monkeypatch, best + 2)  # the count of evaluations goes on where it was
    assert train(bases, **options).code != 0
    assert train(bases, "--resume", **options).code == 0
    assert read_json("run/metrics.json") == read_json("straight/metrics.json")


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3])  # 3: not at the end of the first stage
def test_with_stages_only_the_last_one_stops_early(bases: Path, every: int) -> None:
    training = {
        "learning_rate": 3.0,
        "eval_steps": every,
        "early_stopping_patience": 2,
        "max_steps": 40,
    }
    training |= {"stages": ["global", {"levels": ["mid", "local"], "share": 4}], "max_grad_norm": 0}
    found = train(bases, training=training)
    assert found.code == 0, found.err
    metrics = read_json("run/metrics.json")
    steps = [entry["step"] for entry in metrics["evaluations"]]
    assert steps[-1] > 8  # the first stage, hopeless as it is, is gone through
    assert sum(step > max(8, metrics["best"]["step"]) for step in steps) == 2
    assert f"stopped early at step {steps[-1]} of 40: loss was not better in 2 evalua" in found.out
    assert steps[-1] < 40
    assert "stage 2 of 2" in found.out
    if metrics["best"]["step"] <= 8:
        said = " ".join(found.out.split())
        assert f"What was kept is of step {metrics['best']['step']} of the {steps[-1]}" in said


@pytest.mark.parametrize("task", ["classification", pytest.param("dpo", marks=pytest.mark.slow)])
def test_a_run_is_measured_again_without_its_trackers(bases: Path, task: str) -> None:
    content = config_on(bases, task, training={"max_steps": 1})
    if task == "dpo":
        pairs = [{"prompt": f"w{n}", "chosen": " w1", "rejected": " w2"} for n in range(10)]
        content["data"] = {"train": str(write_jsonl(Path("pairs.jsonl"), pairs))}
    assert command("train", write_config(Path("config.yaml"), content)).code == 0
    before = command("eval", "run", "--json").json()
    record = read_json("run/adapter/task.json")
    record["settings"]["training"]["report_to"] = ["clearml"]  # which is not installed
    Path("run/adapter/task.json").write_text(json.dumps(record))
    again = command("eval", "run", "--json")
    assert again.code == 0, again.err
    assert again.json() == before


def test_a_rehearsal_is_told_to_no_tracker(bases: Path) -> None:
    settings = make_settings(config_on(bases, training={"report_to": ["clearml"]}), "a test")
    with rehearsed(settings):
        assert settings.training.report_to == []
    assert settings.training.report_to == ["clearml"]


def test_trackers_are_named_as_in_transformers_arguments(bases: Path) -> None:
    assert "pip install clearml" in train(bases, training={"report_to": "clearml"}).error
    assert train(bases, training={"report_to": "none", "max_steps": 1}).code == 0


def test_a_base_without_numbers_is_told_from_a_rate_too_high(bases: Path, tmp_path: Path) -> None:
    shutil.copytree(bases / "decoder", tmp_path / "nan")
    weights = tensors(tmp_path / "nan")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, tmp_path / "nan/model.safetensors", {"format": "pt"})
    found = train(bases, model=str(tmp_path / "nan"))
    assert found.code == 1
    assert "the held-out loss is nan before the first step: the base itself gives no" in found.error
    assert "learning_rate" not in found.error


def test_tensorboard_gets_the_norms_of_the_levels(bases: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = train(bases, training={"report_to": ["tensorboard"], "max_steps": 3})
    assert found.code == 0, found.err
    events = EventAccumulator("run/tensorboard")
    events.Reload()
    for entry_name in ("loss", "norm/global", "gradient_norm/local"):
        values = [event.value for event in events.Scalars(f"train/{entry_name}")]
        assert values == pytest.approx([entry[entry_name] for entry in logged("run")])
    assert events.Scalars("eval/loss")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (
            {"training": {"stages": ["global", "mid", "local"], "max_steps": 2}},
            "2 steps are too few",
        ),
        (
            {"training": {"stages": ["global", "mid", "local"], "max_steps": 3}},
            "the stage of global would have one, at the warm-up's first rate, which is 0",
        ),
        ({"training": {"stages": ["glob"]}}, "training.stages names the level 'glob'"),
        ({"training": {"stages": []}}, "training.stages"),
        ({"training": {"stages": [{"levels": ["mid"], "share": 0}]}}, "stages"),
        ({"training": {"frozen_levels": ["top"]}}, "has global, mid, local"),
        (
            {
                "training": {"frozen_levels": ["mid"]},
                "adapter": {"ranks": [4, 2], "groups": [1, 0], "levels": ["all", "own"]},
            },
            "the pyramid has all, own",
        ),
        ({"training": {"frozen_levels": ["global", "mid", "local"]}}, "no level of the pyramid"),
        (
            {"training": {"frozen_levels": ["mid"], "stages": ["global", "mid"]}},
            "training.frozen_levels and training.stages both name mid",
        ),
        ({"training": {"level_learning_rate_factors": {"middle": 2}}}, "Did you mean 'mid'?"),
        ({"training": {"level_learning_rate_factors": {"mid": 0}}}, "greater than 0"),
        ({"training": {"report_to": ["clearml"]}}, "pip install clearml"),
        (
            {"training": {"early_stopping_patience": 1}, "data": {"validation_fraction": 0}},
            "needs held-out rows",
        ),
    ],
)
def test_what_no_run_can_do_is_refused(bases: Path, changes: dict[str, Any], error: str) -> None:
    if "data" in changes:
        changes["data"]["train"] = str(bases / "answered.jsonl")
    found = train(bases, **changes)
    assert found.code == 1
    assert error in found.error
    assert not list(Path().glob("run*"))


@pytest.mark.parametrize("key", ["stages", "frozen_levels", "level_learning_rate_factors"])
def test_an_unknown_level_is_found_before_the_base_is_loaded(
    bases: Path, tmp_path: Path, key: str
) -> None:
    without_weights = shutil.ignore_patterns("*.safetensors")
    base = shutil.copytree(bases / "decoder", tmp_path / "base", ignore=without_weights)
    found = train(
        bases, model=str(base), training={key: {"top": 2} if key.startswith("level") else ["top"]}
    )
    assert f"training.{key} names the level 'top'" in found.error


def test_other_methods_say_what_they_do_not_read(bases: Path) -> None:
    training = {"stages": ["global"], "b_learning_rate_factor": 4.0, "max_steps": 2}
    found = train(bases, "--method", "lora", training=training)
    assert found.code == 0, found.err
    assert "method lora does not read training.stages" in found.out
    assert "b_learning_rate_factor" not in found.out
