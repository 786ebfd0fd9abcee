"""What PEFT's AdaLoRA asks of whoever trains it: steps, pruning, and a penalty once per step.

Its config wants the number of steps before there is a trainer, `update_and_allocate` has to be
called in every step, its penalty stands in every loss that the model returns (an evaluation's too,
and in none where a trainer reads another output), what is pruned trains on until the next pruning
and is in every evaluation until then, though no file holds it, and a checkpoint is loaded by the
ranks that the model's config says. Each is made good here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from msplora.errors import ConfigError
from msplora.sisters.elalora.ranks import orthogonality
from msplora.sisters.steps import counts, refuse_scaled

from .settings_methods import AdaLoraSettings


def for_now(target_r: int, own: Mapping[str, Any]) -> dict[str, Any]:
    """What the config gets before the number of steps is known; `AllocateRanks` says the rest."""
    init_r = own.get("init_r") or math.ceil(1.5 * target_r)
    if init_r <= target_r:
        raise ConfigError(
            f"adalora.init_r = {init_r} is not above adapter.r = {target_r}: AdaLoRA begins with "
            f"more ranks than it keeps. Raise it, or leave it out."
        )
    return {"init_r": init_r, "tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1}


def pruning(own: AdaLoraSettings, steps: int) -> dict[str, int]:
    """What the config gets of a run of so many steps.

    Raises:
        ConfigError: the run is over before ranks could be pruned.
    """
    tinit = steps // 10 if own.tinit is None else own.tinit
    tfinal = steps // 2 if own.tfinal is None else own.tfinal
    delta = max(1, steps // 100) if own.deltaT is None else own.deltaT
    if tinit >= steps - tfinal:
        raise ConfigError(
            f"AdaLoRA would never prune: of {steps} steps the first {tinit} come before it "
            f"(adalora.tinit) and the last {tfinal} after it (adalora.tfinal). Train for longer, "
            f"or lower them."
        )
    return {"total_step": steps, "tinit": tinit, "tfinal": tfinal, "deltaT": delta}


class AllocateRanks(TrainerCallback):
    """Prunes the ranks of an AdaLoRA adapter in a Trainer, and keeps its factors orthogonal.

    An evaluation is of the adapter as it would be saved: without the ranks that are pruned by now.
    They are put back after it, so that evaluations change nothing of the training.

    Args:
        settings: what the run asks for.
        steps: of the whole run, where the trainer takes only the first of them.
    """

    def __init__(self, settings: AdaLoraSettings, steps: int | None = None) -> None:
        self.settings = settings
        self.steps = steps
        self.put_away: list[tuple[nn.Parameter, Tensor]] = []
        """The diagonals during an evaluation, and what they were."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Tell the config how long the run is."""
        refuse_scaled(args, "AdaLoRA")
        config = model.peft_config["default"]
        for name, value in pruning(self.settings, self.steps or state.max_steps).items():
            setattr(config, name, value)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on with what was there before an evaluation."""
        for diagonal, before in self.put_away:
            diagonal.data.copy_(before)
        self.put_away = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Add the penalty's gradient."""
        weight = model.peft_config["default"].orth_reg_weight
        if weight:
            found = [
                factor if ".lora_A." in name else factor.T
                for name, factor in model.named_parameters()
                if name.endswith((".lora_A.default", ".lora_B.default"))
            ]
            with torch.enable_grad():
                (weight * orthogonality(found)).backward()

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **others: Any
    ) -> None:
        """Take in the step's gradients, and prune where that is due."""
        step, config = state.global_step + 1, model.peft_config["default"]
        # The last pruning and what follows read no gradients.
        if step >= config.total_step - config.tfinal or counts(others["optimizer"]):
            model.base_model.update_and_allocate(step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Leave out what is pruned where an evaluation follows."""
        self._as_saved(control, model)

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Leave out what is pruned where epochs are evaluated."""
        self._as_saved(control, model)

    def _as_saved(self, control: Any, model: Any) -> None:
        pattern, tuner = model.peft_config["default"].rank_pattern, model.base_model
        if not control.should_evaluate or not pattern or self.put_away:
            return
        self.put_away = [
            (its, its.detach().clone())
            for name, its in model.named_parameters()
            if name.endswith(".lora_E.default")
        ]
        tuner.rankallocator.mask_using_rank_pattern(tuner.model, pattern)


def averages(model: Any) -> list[Tensor]:
    """What PEFT keeps of every number that AdaLoRA trains, to tell what its rank is worth."""
    allocator = model.base_model.rankallocator
    kept = (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc)
    return [its for tensors in kept for its in tensors.values()]


def leave_penalty_out(model: Any) -> None:
    """Leave the penalty out of the losses of a model; `AllocateRanks` adds its gradient."""
    tuner = model.base_model
    if "trainable_adapter_name" not in tuner.__dict__:  # PEFT looks for it in every loss
        tuner.trainable_adapter_name = next(iter(model.peft_config))
    config = model.peft_config[tuner.trainable_adapter_name]
    weight = config.orth_reg_weight
    tuner.register_forward_pre_hook(lambda *_: setattr(config, "orth_reg_weight", 0.0))
    # Whatever comes of it: the config is saved with the adapter.
    tuner.register_forward_hook(
        lambda *_: setattr(config, "orth_reg_weight", weight), always_call=True
    )


def freeze_rank_numbers(model: Any) -> None:
    """Keep from training what a layer's update is divided by, which no file holds.

    PEFT makes it frozen, and then anew where the base has another dtype or device than it was made
    in: bfloat16, for one.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(".ranknum.default"):
            parameter.requires_grad_(False)


def take_ranks_of(model: Any, checkpoint: Path) -> None:
    """Let an AdaLoRA adapter that is going to load a checkpoint expect that one's ranks."""
    saved: Any = peft.PeftConfig.from_pretrained(str(checkpoint))
    model.peft_config["default"].rank_pattern = saved.rank_pattern


def pruned_whole(model: Any) -> set[str]:
    """The paths of the layers that have no rank left, which is for their ranks to say."""
    pattern = model.peft_config["default"].rank_pattern or {}
    return {
        # PEFT takes the adapter's name out of the keys when it saves.
        f"base_model.model.{name.removesuffix('.default').removesuffix('.lora_E')}"
        for name, stay in pattern.items()
        if not any(stay)
    }


def is_adalora(model: Any) -> bool:
    """Whether a model's adapter is PEFT's AdaLoRA."""
    return str(getattr(model, "peft_type", "")).rpartition(".")[2] == "ADALORA"
