"""The norms of the levels are those of the dense updates, and stand where trackers see them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

import msplora
from adapted_llama import adapted
from msplora.train import LevelNorms, StagedTraining, level_parameters
from msplora.train.level_norms import level_norms
from oracle import layer_of, levels_of, plan_of, randomise, root_of, weight_delta
from test_stages import LEVELS, trainer
from tiny import MODELS


@pytest.mark.parametrize("name", ["llama-all-linear", "gpt2", "mixtral", "t5"])
def test_they_are_the_norms_of_the_dense_updates(name: str) -> None:
    tiny = MODELS[name]
    parameters = {"target_parameters": list(tiny.parameters)} if tiny.parameters else {}
    config = msplora.MSPLoraConfig(target_modules=tiny.targets, use_rslora=True, **parameters)
    model: Any = get_peft_model(tiny.model(), config)
    randomise(model)
    plan, root = plan_of(model), root_of(model)
    squares: dict[str, list[float]] = {level.name: [] for level in plan.levels}
    for site in plan.sites:
        base = layer_of(root, site.key, experts=site.shape.layout == "experts").get_base_layer()
        for pair, a, b, scale in levels_of(model, site, plan):
            delta = weight_delta(site, base, a.double(), b.double(), scale)
            squares[pair.level].append(float(delta.square().sum()))
    found = level_norms(model)
    assert list(found) == list(squares)
    for level, its in squares.items():
        assert found[level] == pytest.approx(math.sqrt(sum(its) / len(its)), rel=1e-5)


def test_a_convolution_with_groups_too() -> None:
    """Each group of outputs reads its own rows of A."""
    convolutions = torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 3, groups=2), torch.nn.Conv2d(8, 8, 3, groups=2)
    )
    made = msplora.MSPLoraConfig(target_modules=["0", "1"], r=8)
    with pytest.warns(UserWarning, match="Merging is not supported"):
        model: Any = get_peft_model(convolutions, made)
    randomise(model)
    plan = plan_of(model)
    squares: dict[str, list[float]] = {level.name: [] for level in plan.levels}
    for site in plan.sites:
        for pair, a, b, scale in levels_of(model, site, plan):
            rows, outputs = a.double().chunk(2), b.double().chunk(2)
            deltas = [
                scale * torch.einsum("or,rikl->oikl", out[:, :, 0, 0], its)
                for out, its in zip(outputs, rows, strict=True)
            ]
            squares[pair.level].append(sum(float(its.square().sum()) for its in deltas))
    expected = {level: math.sqrt(sum(its) / len(its)) for level, its in squares.items()}
    assert level_norms(model) == pytest.approx(expected, rel=1e-5)


def test_they_stand_in_the_log_where_trackers_see_them(tmp_path: Path) -> None:
    class Tracker(TrainerCallback):
        seen: ClassVar[list[dict[str, float]]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.seen.append(dict(logs))

    class Gradients(TrainerCallback):
        norms: ClassVar[list[dict[str, float]]] = []

        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            self.norms.append(
                {
                    f"gradient_norm/{level}": math.sqrt(
                        sum(float(its.grad.square().sum()) for its in parameters)
                    )
                    for level, parameters in level_parameters(model).items()
                    if parameters[0].grad is not None
                }
            )

    model = adapted()
    run = trainer(
        tmp_path,
        model,
        Tracker(),
        Gradients(),
        StagedTraining(LEVELS),
        logging_steps=3,
        max_grad_norm=0.1,
        max_steps=9,
    )
    LevelNorms().attach(run)
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [3, 6, 9]
    for place, entry in enumerate(entries):
        expected = Gradients.norms[entry["step"] - 1]
        gradients = {key: value for key, value in entry.items() if key.startswith("gradient")}
        assert gradients == pytest.approx(expected, rel=1e-4)
        assert list(gradients) == [f"gradient_norm/{LEVELS[place]}"]
        assert gradients[f"gradient_norm/{LEVELS[place]}"] <= 0.1 * 1.001
        assert {f"norm/{level}" for level in LEVELS} <= entry.keys()
        assert Tracker.seen[place].items() <= entry.items()
        assert Tracker.seen[place].keys() >= entry.keys() - {"step"}
    last = {f"norm/{level}": norm for level, norm in level_norms(model).items()}
    assert {key: entries[-1][key] for key in last} == pytest.approx(last)


def test_nothing_is_added_to_what_is_no_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, adapted(), max_steps=2)
    LevelNorms().attach(run)
    run.train()
    assert not [entry for entry in run.state.log_history if "norm/global" in entry]
