"""Parameter groups: who is stepped at which rate, and that the optimiser really does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import msplora
from adapted_llama import BATCH, LLAMA, TARGETS, adapted, config
from msplora.errors import ConfigError, MSPLoraError
from msplora.train import parameter_groups
from test_stages import trainer

FACTORS: dict[str, Any] = {
    "level_factors": {"local": 2.0, "mid": 0.5},
    "b_factor": 16.0,
    "head_factor": 0.25,
}


def expected_factor(name: str) -> float:
    if "lm_head" in name:
        return 0.25
    levels = {"/global/": 1.0, ".global/": 1.0, ".mid/": 0.5, ".local/": 2.0}
    [of_level] = {factor for part, factor in levels.items() if part in name} or {1.0}
    return of_level * (16.0 if "msplora_B" in name or "lora_B" in name else 1.0)


@pytest.mark.parametrize("lora", [False, True])
def test_everything_that_trains_is_in_one_group_at_its_rate(lora: bool) -> None:
    kind: Any = LoraConfig if lora else msplora.MSPLoraConfig
    made = kind(target_modules=TARGETS, modules_to_save=["lm_head"], bias="all")
    model = get_peft_model(LLAMA.model(), made)
    factors = {**FACTORS, "level_factors": {}} if lora else FACTORS
    groups = parameter_groups(model, 1e-3, weight_decay=0.1, **factors)
    rates = {id(its): group["lr"] for group in groups for its in group["params"]}
    trains = {name: its for name, its in model.named_parameters() if its.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(trains)
    for name, parameter in trains.items():
        assert rates[id(parameter)] == pytest.approx(1e-3 * expected_factor(name)), name
    assert {group["weight_decay"] for group in groups} == {0.1}
    assert len({(group["lr"], group["weight_decay"]) for group in groups}) == len(groups)


def test_one_group_where_nothing_differs_and_the_usual_rate_first() -> None:
    assert len(parameter_groups(adapted(), 1e-3)) == 1
    groups = parameter_groups(adapted(), 1e-3, level_factors={"global": 0.1})
    assert [group["lr"] for group in groups] == pytest.approx([1e-3, 1e-4])


def test_biases_and_norms_do_not_decay() -> None:
    model = LLAMA.model()
    [decays, rest] = parameter_groups(model, 1e-3, weight_decay=0.1)[::-1]
    assert (decays["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(its): name for name, its in model.named_parameters()}
    assert all("norm" in names[id(its)] for its in rest["params"])
    assert not any("norm" in names[id(its)] for its in decays["params"])


def test_the_factors_act_in_a_step() -> None:
    def moved(**factors: Any) -> dict[str, torch.Tensor]:
        model = adapted()
        optimizer = torch.optim.SGD(parameter_groups(model, 0.1, **factors))
        before = {name: its.detach().clone() for name, its in model.named_parameters()}
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        optimizer.step()
        return {name: its.detach() - before[name] for name, its in model.named_parameters()}

    plain, scaled = moved(), moved(level_factors={"local": 2.0}, b_factor=3.0)
    for name, step in plain.items():
        factor = (2.0 if ".local/" in name else 1.0) * (3.0 if "msplora_B" in name else 1.0)
        torch.testing.assert_close(scaled[name], factor * step, rtol=1e-3, atol=1e-6)


def test_decay_acts_on_the_pairs() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, weight_decay=0.5))
    before = {name: (a.clone(), b.clone()) for name, (a, b, _) in msplora.factors(model).items()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for address, (a, b, _) in msplora.factors(model).items():
        torch.testing.assert_close(a, before[address][0] * (1 - 0.1 * 0.5))
        torch.testing.assert_close(b, before[address][1] * (1 - 0.1 * 0.5))


def test_a_trainer_takes_them(tmp_path: Path) -> None:
    """The schedule moves every group, and none is lost."""
    model = adapted(random=False)
    groups = parameter_groups(model, 1e-2, b_factor=4.0)
    run = trainer(tmp_path, model, max_steps=4, save_steps=2)
    run.optimizer = optimizer = torch.optim.AdamW(groups)
    run.train()
    assert [group["initial_lr"] for group in optimizer.param_groups] == pytest.approx([1e-2, 4e-2])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0, 0.0])
    stepped = {id(its) for its in optimizer.state}
    assert stepped == {id(its) for its in model.parameters() if its.requires_grad}


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"level_factors names the level 'lokal'.*'local'"):
        parameter_groups(adapted(), 1e-3, level_factors={"lokal": 2.0})
    with pytest.raises(ConfigError, match=r"factor of mid is 0.* freeze"):
        parameter_groups(adapted(), 1e-3, level_factors={"mid": 0.0})
    with pytest.raises(ConfigError, match="factor of b_factor is -1"):
        parameter_groups(adapted(), 1e-3, b_factor=-1.0)
    lora = get_peft_model(LLAMA.model(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(MSPLoraError, match="no MSPLoRA adapter"):
        parameter_groups(lora, 1e-3, level_factors={"local": 2.0})


def test_levels_of_ones_own() -> None:
    long = config(levels=["all", "own"], ranks=[4, 2], groups=[1, 0], alphas=[8, 8], r=4)
    model = get_peft_model(LLAMA.model(), long)
    [usual, own] = parameter_groups(model, 1e-3, level_factors={"own": 3.0})
    names = {id(its): name for name, its in model.named_parameters()}
    assert all(".own/" in names[id(its)] for its in own["params"])
    assert all(".all/" in names[id(its)] for its in usual["params"])
