"""Staged training: in each stage one level trains, as if it were a run of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import msplora
from adapted_llama import LLAMA, adapted
from msplora.errors import ConfigError, MSPLoraError
from msplora.train import Stage, StagedTraining, freeze_levels, level_parameters
from msplora.train.stages import stage_ends
from oracle import same_tensors, tensors_of
from test_trainers import rows

LEVELS = ["global", "mid", "local"]


class Watch(TrainerCallback):
    """What each step began with, whose gradients it had, and at which rate it went."""

    def __init__(self) -> None:
        self.before: list[dict[str, tuple[Tensor, Tensor]]] = []
        self.with_gradient: list[set[str]] = []
        self.rates: list[float] = []

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.before.append(copy_of(model))

    def on_pre_optimizer_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        self.with_gradient.append(
            {
                level
                for level, parameters in level_parameters(model).items()
                if any(its.grad is not None for its in parameters)
            }
        )
        self.rates.append(optimizer.param_groups[0]["lr"])


def copy_of(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (a.clone(), b.clone()) for name, (a, b) in tensors_of(model).items()}


def changed_levels(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
    return {
        address.partition("/")[0]
        for address in first
        if not all(map(torch.equal, first[address], second[address]))
    }


def trainer(folder: Path, model: Any, *callbacks: TrainerCallback, **changes: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 9,
        "save_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,  # would act on a level that is left alone, if anything did
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    made = TrainingArguments(**arguments | changes)
    return Trainer(model=model, args=made, train_dataset=rows(), callbacks=list(callbacks))


def staged(folder: Path, stages: Sequence[Any], resume: str | None = None, **changes: Any) -> Any:
    """A staged run: the model, and what each of its steps saw."""
    options = {key: changes.pop(key) for key in ("restart_schedule", "tell") if key in changes}
    torch.manual_seed(0)
    model, watch = adapted(random=False), Watch()
    # The watch stands first: it sees a step before the stage is taken up.
    run = trainer(folder, model, watch, StagedTraining(stages, **options), **changes)
    run.train(resume_from_checkpoint=resume)
    watch.before.append(copy_of(model))
    return model, watch


def test_only_the_level_of_the_stage_changes(tmp_path: Path) -> None:
    told: list[str] = []
    _, watch = staged(tmp_path, LEVELS, tell=told.append, lr_scheduler_type="constant")
    for step, (first, second) in enumerate(zip(watch.before, watch.before[1:], strict=False)):
        assert changed_levels(first, second) == {LEVELS[step // 3]}
    assert watch.with_gradient == [{LEVELS[step // 3]} for step in range(9)]
    assert told == [
        "stage 1 of 3: global until step 3",
        "stage 2 of 3: mid until step 6",
        "stage 3 of 3: local until step 9",
    ]


def test_stages_of_several_levels_and_given_shares(tmp_path: Path) -> None:
    stages = [Stage(("global",), share=2), Stage(("mid", "global"), share=1)]
    _, watch = staged(tmp_path, stages, lr_scheduler_type="constant")
    assert watch.with_gradient == [{"global"}] * 6 + [{"global", "mid"}] * 3
    assert changed_levels(watch.before[0], watch.before[-1]) == {"global", "mid"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}),
        ("cosine", {"warmup_steps": 3}),
        pytest.param("linear", {"warmup_steps": 3}, marks=pytest.mark.slow),
        pytest.param("polynomial", {}, marks=pytest.mark.slow),
        pytest.param("constant_with_warmup", {"warmup_steps": 3}, marks=pytest.mark.slow),
    ],
)
def test_each_stage_goes_through_the_whole_schedule(
    tmp_path: Path, name: str, options: dict[str, int]
) -> None:
    def rates(steps: int, *callbacks: TrainerCallback, **options: Any) -> list[float]:
        watch = Watch()
        options |= {"lr_scheduler_type": name, "max_steps": steps}
        trainer(tmp_path, adapted(), watch, *callbacks, **options).train()
        return watch.rates

    found = rates(9, StagedTraining(LEVELS), **options)
    alone = rates(3, **{key: value // 3 for key, value in options.items()})
    assert found == pytest.approx(alone * 3)
    whole = rates(9, StagedTraining(LEVELS, restart_schedule=False), **options)
    assert whole == rates(9, **options)


def test_a_stage_is_the_run_that_trains_its_level_alone(tmp_path: Path) -> None:
    """Adam's moments, the clipping and the schedule of a stage owe nothing to other levels."""
    options = {"max_grad_norm": 0.05}
    _, watch = staged(tmp_path, LEVELS, **options)
    torch.manual_seed(0)
    alone = adapted(random=False)
    freeze_levels(alone, ["mid", "local"])
    trainer(tmp_path, alone, max_steps=3, **options).train()
    for address, tensors in tensors_of(alone).items():
        for found, expected in zip(watch.before[3][address], tensors, strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("checkpoint", [2, 3, 4])  # inside a stage, and at the end of one
def test_a_run_resumed_in_a_stage_is_the_uninterrupted_one(tmp_path: Path, checkpoint: int) -> None:
    stages = [Stage(("global",)), Stage(("mid", "local"), share=2)]
    straight, whole = staged(tmp_path, stages, save_steps=1)
    resumed, rest = staged(tmp_path, stages, str(tmp_path / f"checkpoint-{checkpoint}"))
    assert same_tensors(tensors_of(resumed), tensors_of(straight))
    assert rest.with_gradient == whole.with_gradient[checkpoint:]
    assert rest.rates == whole.rates[checkpoint:]


def test_what_is_no_level_trains_in_every_stage(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adapted(random=False, modules_to_save=["lm_head"])
    [head] = [its for name, its in model.named_parameters() if "modules_to_save" in name]

    class Head(TrainerCallback):
        values: ClassVar[list[Tensor]] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.values.append(head.detach().clone())

    constant = {"lr_scheduler_type": "constant"}
    trainer(tmp_path, model, Head(), StagedTraining(LEVELS), **constant).train()
    assert not any(map(torch.equal, Head.values, Head.values[1:]))


def test_afterwards_what_was_staged_can_train_again(tmp_path: Path) -> None:
    model, _ = staged(tmp_path, LEVELS)
    for parameters in level_parameters(model).values():
        assert all(its.requires_grad for its in parameters)


def test_stage_ends_follow_the_shares() -> None:
    stages = [Stage(("a",), 0.5), Stage(("b",), 0.25), Stage(("c",), 0.25)]
    assert stage_ends(stages, 100) == [50, 75, 100]
    assert stage_ends([Stage((its,)) for its in "abc"], 10) == [3, 7, 10]
    assert stage_ends([Stage((its,)) for its in "abc"], 3) == [1, 2, 3]


def test_what_cannot_be_staged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 steps are too few for 3 stages: the stage of"):
        trainer(tmp_path, adapted(), StagedTraining(LEVELS), max_steps=2).train()
    with pytest.raises(ConfigError, match=r"too few for 3 .* of global would have one,"):
        trainer(tmp_path, adapted(), StagedTraining(LEVELS), max_steps=3, warmup_steps=1).train()
    with pytest.raises(ConfigError, match=r"'globl', and the pyramid has global, mid, local.*mean"):
        trainer(tmp_path, adapted(), StagedTraining(["globl"])).train()
    with pytest.raises(ConfigError, match="no stage"):
        StagedTraining([])
    with pytest.raises(ConfigError, match="names no level"):
        StagedTraining([[]])
    with pytest.raises(ConfigError, match="share 0"):
        Stage(("global",), share=0)
    lora = get_peft_model(LLAMA.model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(MSPLoraError, match="no MSPLoRA adapter"):
        trainer(tmp_path, lora, StagedTraining(LEVELS)).train()
    run = trainer(tmp_path, adapted())
    steps = torch.optim.lr_scheduler.StepLR(run.create_optimizer(), 1)
    begin = StagedTraining(LEVELS).on_train_begin
    run.state.max_steps = 9
    with pytest.raises(MSPLoraError, match="cannot restart a StepLR"):
        begin(run.args, run.state, run.control, model=run.model, lr_scheduler=steps)
    run.args.deepspeed_plugin = object()  # pyright: ignore
    with pytest.raises(ConfigError, match=r"do not run under DeepSpeed.*FSDP2"):
        begin(run.args, run.state, run.control, model=run.model, lr_scheduler=steps)


def test_frozen_levels_do_not_train(tmp_path: Path) -> None:
    model = adapted()
    before = copy_of(model)
    freeze_levels(model, ["global"])
    trainer(tmp_path, model).train()
    assert changed_levels(before, copy_of(model)) == {"mid", "local"}
    with pytest.raises(ConfigError, match="no level of the pyramid to train"):
        freeze_levels(model, LEVELS)
    with pytest.raises(ConfigError, match="frozen_levels names the level 'top'"):
        freeze_levels(model, ["top"])


def test_a_second_adapter_has_levels_of_its_own() -> None:
    model = adapted()
    model.add_adapter("other", msplora.MSPLoraConfig(target_modules=["q_proj"]))
    model.set_adapter("other")
    freeze_levels(model, ["mid"], "other")
    trains = {
        (name, level): {its.requires_grad for its in parameters}
        for name in ("default", "other")
        for level, parameters in level_parameters(model, name).items()
    }
    assert trains["other", "mid"] == {False}
    assert trains["other", "global"] == trains["other", "local"] == {True}
    assert trains["default", "mid"] == {False}  # it is not the active one
