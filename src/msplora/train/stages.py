"""Staged training: global, then mid, then local, each for its share of the steps.

The released code of the paper (arXiv 2503.21838) has it as an option: the run is cut into parts,
and in each only one level trains. What is no pair of the pyramid (a classifier's head, biases,
DoRA's magnitudes) trains in every stage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import SchedulerType, TrainerCallback

from msplora.errors import ConfigError, MSPLoraError

from .levels import check_level_names, level_parameters

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """Some levels that train together, and for how long: in proportion to the other stages."""

    levels: tuple[str, ...]
    share: float = 1.0

    def __post_init__(self) -> None:
        if not self.levels:
            raise ConfigError("a stage names no level. Name at least one, or leave the stage out.")
        if not self.share > 0:
            raise ConfigError(
                f"the stage of {self} has the share {self.share}; a share is above 0."
            )

    def __str__(self) -> str:
        return " and ".join(self.levels)


def stage_ends(stages: Sequence[Stage], steps: int, warms_up: bool = False) -> list[int]:
    """The step at which each stage ends, the last of them at `steps`.

    Args:
        stages: in order.
        steps: of the whole run.
        warms_up: each stage begins at a learning rate of 0, so that one step would train nothing.

    Raises:
        ConfigError: there are so few steps that a stage would train nothing.
    """
    total = sum(stage.share for stage in stages)
    shares = [sum(its.share for its in stages[: place + 1]) for place in range(len(stages))]
    ends = [round(steps * share / total) for share in shares]
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if min(lengths) < 1 + warms_up:
        short = stages[lengths.index(min(lengths))]
        has = "one, at the warm-up's first rate, which is 0" if min(lengths) else "none"
        raise ConfigError(
            f"{steps} steps are too few for {len(stages)} stages: the stage of {short} would have "
            f"{has}. Train for more epochs, in smaller batches, or in fewer stages."
        )
    return ends


class StagedTraining(TrainerCallback):
    """Trains the levels of a pyramid one stage after the other; for any Trainer, TRL's included.

    ::

        Trainer(model, …, callbacks=[StagedTraining(["global", "mid", "local"])])
        StagedTraining([Stage(("global",), share=2), Stage(("mid", "local"))])

    A stage depends on the step alone, so a resumed run goes on inside the stage it was in. Levels
    of other stages get no gradient: the optimiser leaves their numbers and their moments alone,
    and their gradients do not count where gradients are clipped. Each stage goes through the whole
    learning-rate schedule, warm-up included, since its level has not been trained before.

    Args:
        stages: in order; a name or several stand for stages of equal length. A level that no stage
            names does not train.
        adapter_name: whose levels.
        restart_schedule: False leaves one schedule over the whole run: the first stage warms up,
            and the last one has only the schedule's low end.
        tell: is given a line as each stage begins; unset, the line is logged.
    """

    def __init__(
        self,
        stages: Iterable[Stage | str | Sequence[str]],
        adapter_name: str = "default",
        restart_schedule: bool = True,
        tell: Callable[[str], None] = _logger.info,
    ) -> None:
        self.stages = [_as_stage(stage) for stage in stages]
        if not self.stages:
            raise ConfigError("staged training has no stage. Name the levels of at least one.")
        self.adapter_name = adapter_name
        self.restart_schedule = restart_schedule
        self.tell = tell
        self._ends: list[int] = []
        self._stage: int | None = None
        self._trained: list[nn.Parameter] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **others: Any
    ) -> None:
        """Check the stages against the pyramid and the number of steps, and set the schedule."""
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise ConfigError(
                "staged training and frozen levels do not run under DeepSpeed, which leaves what "
                "does not train out of its checkpoints: the run could not go on from one, nor save "
                "the adapter whole. Use FSDP2 or DDP."
            )
        by_level = level_parameters(model, self.adapter_name)
        for stage in self.stages:
            check_level_names(stage.levels, by_level, "a stage")
        restarts = self.restart_schedule and len(self.stages) > 1
        warms_up = restarts and args.get_warmup_steps(state.max_steps) > 0
        warms_up &= args.lr_scheduler_type != SchedulerType.CONSTANT  # which knows no warm-up
        self._ends = stage_ends(self.stages, state.max_steps, warms_up)
        self._stage = None
        named = {level for stage in self.stages for level in stage.levels}
        self._trained = [parameter for level in named for parameter in by_level[level]]
        if restarts:
            _restart_at([0, *self._ends], others["lr_scheduler"])

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Take up the stage that the step belongs to."""
        stage = sum(end <= state.global_step for end in self._ends)
        if stage != self._stage:
            self._stage = stage
            self.tell(
                f"stage {stage + 1} of {len(self.stages)}: {self.stages[stage]} until step "
                f"{self._ends[stage]}"
            )
        self._freeze_others(model)

    def on_substep_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Before each further batch of a step: PEFT thaws an adapter that was turned off, as DPO
        does for its reference."""
        self._freeze_others(model)

    def _freeze_others(self, model: nn.Module) -> None:
        assert self._stage is not None
        levels = self.stages[self._stage].levels
        for level, parameters in level_parameters(model, self.adapter_name).items():
            for parameter in parameters:
                parameter.requires_grad_(level in levels)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave what was trainable trainable."""
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._trained = []


def _as_stage(stage: Stage | str | Sequence[str]) -> Stage:
    if isinstance(stage, Stage):
        return stage
    return Stage((stage,) if isinstance(stage, str) else tuple(stage))


def _restart_at(bounds: list[int], scheduler: Any) -> None:
    """Make a scheduler go through all of its course between any two neighbouring bounds."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        raise MSPLoraError(
            f"staged training cannot restart a {type(scheduler).__name__} at each stage. Use one "
            f"of the Trainer's schedules, or restart_schedule=False."
        )
    steps = bounds[-1]

    def within(whole: Callable[..., float]) -> Callable[[int], float]:
        def rate(step: int) -> float:
            stage = min(sum(end <= step for end in bounds[1:]), len(bounds) - 2)
            start, end = bounds[stage : stage + 2]
            return whole((step - start) * steps / (end - start))

        return rate

    scheduler.lr_lambdas = [within(whole) for whole in scheduler.lr_lambdas]
