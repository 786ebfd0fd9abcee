"""What PEFT's AdaLoRA asks of whoever trains it: steps, pruning, and a penalty once per step.

Its config wants the number of steps before there is a trainer, `update_and_allocate` has to be
called in every step, its penalty stands in every loss that the model returns (an evaluation's too,
and in none where a trainer reads another output), and a checkpoint is loaded by the ranks that the
model's config says. Each is made good here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import TrainerCallback

from msplora.errors import ConfigError
from msplora.sisters.elalora.ranks import orthogonality

from .settings_methods import AdaLoraSettings


def for_now(target_r: int, own: Mapping[str, Any]) -> dict[str, Any]:
    """What the config gets before the number of steps is known; `AllocateRanks` says the rest."""
    init_r = own.get("init_r") or math.ceil(1.5 * target_r)
    if init_r < target_r:
        raise ConfigError(
            f"adalora.init_r = {init_r} is below adapter.r = {target_r}: AdaLoRA prunes ranks and "
            f"adds none. Raise it, or leave it out."
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
    """Prunes the ranks of an AdaLoRA adapter in a Trainer, and keeps its factors orthogonal."""

    def __init__(self, settings: AdaLoraSettings) -> None:
        self.settings = settings

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Tell the config how long the run is."""
        config = model.peft_config["default"]
        for name, value in pruning(self.settings, state.max_steps).items():
            setattr(config, name, value)

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
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Take in the step's gradients, and prune where that is due."""
        model.base_model.update_and_allocate(state.global_step + 1)


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


def take_ranks_of(model: Any, checkpoint: Path) -> None:
    """Let an AdaLoRA adapter that is going to load a checkpoint expect that one's ranks."""
    saved: Any = peft.PeftConfig.from_pretrained(str(checkpoint))
    model.peft_config["default"].rank_pattern = saved.rank_pattern


def is_adalora(model: Any) -> bool:
    """Whether a model's adapter is PEFT's AdaLoRA."""
    return str(getattr(model, "peft_type", "")).rpartition(".")[2] == "ADALORA"
