"""After training: what was saved is what was measured, and a level that learnt nothing is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import msplora
from adapted_llama import LLAMA, TARGETS, adapted
from msplora.sisters import HydraConfig
from msplora.train import results
from msplora.train.self_check import untrained
from runs import Result, config_on, save_bases, write_config
from runs import msplora as command


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(bases: Path, task: str = "sft", *flags: object, **changes: Any) -> Result:
    training = {"epochs": 2} | changes.pop("training", {})
    content = config_on(bases, task, training=training, **changes)
    return command("train", write_config(Path("config.yaml"), content), *flags)


def metrics() -> dict[str, Any]:
    return json.loads(Path("run/metrics.json").read_text())


@pytest.mark.parametrize("method", ["msplora", "lora"])
@pytest.mark.parametrize("task", ["sft", "classification"])
def test_the_saved_adapter_is_measured_again(bases: Path, task: str, method: str) -> None:
    found = train(bases, task, "--method", method)
    assert found.code == 0, found.err
    assert "Look:" not in found.out
    best = metrics()["best"]
    assert metrics()["reloaded"] == {key: best[key] for key in metrics()["reloaded"]}
    assert "loss" in metrics()["reloaded"]
    # The check leaves no second adapter, and no entry in the history.
    assert not any(
        "reloaded" in name for name in load_file("run/adapter/adapter_model.safetensors")
    )
    history = json.loads(Path("run/log_history.json").read_text())
    assert sum("eval_loss" in entry for entry in history) == 2


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, by: float) -> None:
    """Let something go wrong with one tensor between the model and the disk."""
    usual = results.write_weights

    def write_weights(*arguments: Any) -> Path:
        weights = usual(*arguments)
        file = weights / "adapter_model.safetensors"
        tensors = load_file(file)
        [spoilt] = [its for its in tensors if its.endswith(name)]
        tensors[spoilt] = tensors[spoilt] + by
        save_file(tensors, file, metadata={"format": "pt"})
        return weights

    monkeypatch.setattr("msplora.train.run.write_weights", write_weights)


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("sft", "store.mid/1/self_attn/q_proj/pair.msplora_B.factor"),
        ("classification", "classifier.weight"),
    ],
)
def test_a_file_that_is_not_what_was_trained_stops_the_run(
    bases: Path, monkeypatch: pytest.MonkeyPatch, task: str, name: str
) -> None:
    spoil(monkeypatch, name, 1e-4)
    found = train(bases, task)
    assert found.code == 1
    assert "is not the trained one: 1 tensors differ" in found.error
    assert not Path("run").exists()
    unchecked = train(bases, task, "--force", training={"check_saved": False})
    assert unchecked.code == 0
    assert "reloaded" not in metrics()


def test_a_loss_that_is_not_the_reported_one_stops_the_run(
    bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = results.measured

    def measured(*arguments: Any) -> dict[str, Any]:
        found = usual(*arguments)
        found["best"]["loss"] += 0.01
        return found

    monkeypatch.setattr("msplora.train.run.measured", measured)
    found = train(bases)
    assert found.code == 1
    assert "on the held-out rows, and the run measured" in found.error


@pytest.mark.parametrize(
    ("method", "task", "bias"),
    [
        ("msplora", "classification", "all"),
        ("msplora", "classification", "msplora_only"),
        ("lora", "classification", "lora_only"),
        ("msplora", "sft", "all"),
    ],
)
def test_an_adapter_with_biases_is_measured_again(
    bases: Path, method: str, task: str, bias: str
) -> None:
    """PEFT loads no second adapter beside one that trains the base's biases."""
    found = train(bases, task, "--method", method, adapter={"bias": bias})
    assert found.code == 0, found.err
    best = metrics()["best"]
    assert metrics()["reloaded"] == {key: best[key] for key in metrics()["reloaded"]}


def test_a_bias_that_is_not_what_was_trained_stops_the_run(
    bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "layer.0.attention.self.query.base_layer.bias", 1e-4)
    found = train(bases, "classification", adapter={"bias": "all"})
    assert found.code == 1
    assert "is not the trained one: 1 tensors differ" in found.error


def test_a_level_that_learnt_nothing_is_named(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that the loss does not reach, say: here its pair's gradient is taken away."""
    from msplora.train import learning_rates

    usual = learning_rates.parameter_groups

    def without_the_last_layer(model: Any, *arguments: Any, **more: Any) -> Any:
        for address, (a, b, _) in msplora.factors(model).items():
            if address.startswith("local/3/"):
                a.requires_grad_(False)
                b.requires_grad_(False)
        return usual(model, *arguments, **more)

    monkeypatch.setattr("msplora.train.run_trainer.parameter_groups", without_the_last_layer)
    found = train(bases)
    assert found.code == 0, found.err
    said = " ".join(found.out.split())
    assert "Look: the level local adds nothing at 2 of the adapted layers" in said
    assert "model.layers.3.self_attn.q_proj, model.layers.3.self_attn.v_proj" in said
    assert said.count("Look:") == 1


def test_levels_that_were_not_to_train_are_not_named(bases: Path) -> None:
    assert "Look:" not in train(bases, training={"stages": ["global"]}).out


def test_frozen_levels_of_a_new_adapter_are_named(bases: Path) -> None:
    """They add nothing at all: that is worth a word, whatever was asked for."""
    said = " ".join(train(bases, training={"frozen_levels": ["mid"]}).out.split())
    assert "Look: the level mid adds nothing at 8 of the adapted layers" in said
    assert "training.frozen_levels names it" in said
    assert "no gradient" not in said


def test_untrained_finds_zeros_and_nothing_else() -> None:
    model = adapted()
    assert untrained(model) == {}
    with torch.no_grad():
        msplora.factors(model)["mid/2/self_attn.v_proj"][1].zero_()
    assert untrained(model) == {"mid": ["model.layers.3.self_attn.v_proj"]}
    assert untrained(adapted(random=False)).keys() == {"global", "mid", "local"}
    lora: Any = get_peft_model(LLAMA.model(), LoraConfig(target_modules=TARGETS))
    assert len(untrained(lora)["adapter"]) == 8
    for layer in lora.modules():
        if hasattr(layer, "lora_B") and "default" in getattr(layer, "lora_B"):  # noqa: B009
            torch.nn.init.ones_(layer.lora_B["default"].weight)
    assert untrained(lora) == {}


def test_untrained_finds_a_diagonal_of_zeros() -> None:
    """AdaLoRA's A and B are random from the start."""
    options: dict[str, Any] = {"target_modules": TARGETS, "total_step": 10}
    model: Any = get_peft_model(LLAMA.model(), AdaLoraConfig(**options))
    assert len(untrained(model)["adapter"]) == 8
    diagonals = {name: its for name, its in model.named_parameters() if ".lora_E." in name}
    for its in diagonals.values():
        torch.nn.init.ones_(its)
    assert untrained(model) == {}
    name, pruned = next(iter(diagonals.items()))
    torch.nn.init.zeros_(pruned)
    assert untrained(model) == {"adapter": [name.removesuffix(".lora_E.default")]}
    # Without a rank, and so meant: the keys are PEFT's, before it has saved and after.
    key = name.removeprefix("base_model.model.")
    for its in (key, key.removesuffix(".default")):
        model.peft_config["default"].rank_pattern = {its: [False] * len(pruned)}
        assert untrained(model) == {}


def test_untrained_finds_a_branch_that_stands_still() -> None:
    model: Any = get_peft_model(LLAMA.model(), HydraConfig(target_modules=TARGETS))
    found = untrained(model)
    assert {name: len(its) for name, its in found.items()} == {
        "parallel branch": 8,
        "sequential branch": 8,
    }
    for name, its in model.named_parameters():
        if "_B." in name:
            torch.nn.init.ones_(its)
    assert untrained(model) == {}
    path = found["sequential branch"][3]
    torch.nn.init.zeros_(model.get_submodule(path).hydra_sequential_B["default"].weight)
    assert untrained(model) == {"sequential branch": [path]}
