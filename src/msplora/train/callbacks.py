"""The callbacks a run's settings ask for: stages, the levels' figures, early stopping, trackers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.integrations import (
    TensorBoardCallback,
    get_available_reporting_integrations,
    is_deepspeed_zero3_enabled,
)

from msplora.errors import ConfigError
from msplora.sisters.elalora.config import ElaLoraConfig
from msplora.sisters.elalora.moving import MoveRanks
from msplora.sisters.elalora.ranks import Phases

from .adalora import AllocateRanks, pruning
from .devices import is_main_process
from .level_history import LevelHistory
from .level_norms import LevelNorms
from .methods import Adapted
from .settings import Settings
from .stages import Stage, StagedTraining, stage_ends
from .stopping_early import stop_early

TENSORBOARD = "tensorboard"
"""The tracker whose files belong to the run folder, and the folder in it that holds them."""


def check_trackers(settings: Settings) -> None:
    """Refuse a tracker whose library is missing, before anything is loaded.

    Raises:
        ConfigError: there is one.
    """
    missing = sorted({*settings.training.report_to} - {*get_available_reporting_integrations()})
    if missing:
        raise ConfigError(
            f"training.report_to names {', '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed: pip install "
            f"{' '.join(missing)}. Or leave it out."
        )


def check_steps(settings: Settings, steps: int) -> None:
    """Refuse a run too short for its stages, or for ranks to move, before anything is written.

    Raises:
        ConfigError: there is one.
    """
    if settings.method == "msplora" and settings.training.stages:
        stages, training = stages_of(settings), settings.training
        warms_up = len(stages) > 1 and training.restart_schedule and training.warmup_ratio > 0
        stage_ends(stages, steps, warms_up and training.scheduler != "constant")
    if settings.method == "elalora":
        Phases.of(ElaLoraConfig(**settings.elalora.model_dump()), steps)
    if settings.method == "adalora":
        pruning(settings.adalora, steps)


def stages_of(settings: Settings) -> list[Stage]:
    """The stages of a run."""
    return [Stage(tuple(its.levels), its.share) for its in settings.training.stages or ()]


def add_rank_callbacks(
    trainer: Any, settings: Settings, tell: Callable[[str], None], steps: int | None = None
) -> None:
    """Attach to a trainer what moves the ranks of ElaLoRA, and prunes those of AdaLoRA.

    `steps` are those of the whole run, where the trainer takes only the first of them.
    """
    if settings.method == "elalora":
        trainer.add_callback(MoveRanks(tell=tell, steps=steps))
    if settings.method == "adalora":
        trainer.add_callback(AllocateRanks(settings.adalora, steps))


def add_callbacks(
    trainer: Any, settings: Settings, adapted: Adapted, folder: Path, tell: Callable[[str], None]
) -> None:
    """Attach to a trainer what the settings ask for.

    Args:
        trainer: transformers' or TRL's, about to train.
        settings: of the run.
        adapted: the model it trains.
        folder: the run's, for the files of a tracker that writes some.
        tell: prints a line.
    """
    training = settings.training
    if training.early_stopping_patience:
        stages = stages_of(settings) if adapted.plan else []
        stop_early(trainer, training.early_stopping_patience, stages, tell)
    add_rank_callbacks(trainer, settings, tell)
    if adapted.plan:
        stages = stages_of(settings)
        if training.frozen_levels and not stages:
            # Loading a checkpoint thaws everything; one stage of all the others keeps it frozen.
            named = [level.name for level in adapted.plan.levels]
            stages = [Stage(tuple(its for its in named if its not in training.frozen_levels))]
        if stages:
            told = tell if len(stages) > 1 else lambda _: None
            restarts = training.restart_schedule
            trainer.add_callback(StagedTraining(stages, restart_schedule=restarts, tell=told))
        if not is_deepspeed_zero3_enabled():  # which leaves no process a whole pair
            LevelNorms().attach(trainer)
    trainer.add_callback(LevelHistory(folder / "checkpoints", settings, tell))
    if is_main_process() and TENSORBOARD in training.report_to:
        from torch.utils.tensorboard import SummaryWriter

        # By itself it would write among the checkpoints, which go when the run is complete.
        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(folder / TENSORBOARD))))
