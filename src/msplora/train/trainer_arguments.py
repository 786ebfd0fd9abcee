"""What both trainers are told, from a run's settings."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer

from .base_model import Base
from .callbacks import TENSORBOARD
from .devices import counted_processes, has_accelerator
from .metric_order import sign_of
from .settings import Settings


def trainer_arguments(
    settings: Settings, base: Base, checkpoints: Path, rows: int, held_out: bool, best: str
) -> dict[str, Any]:
    """Return the arguments that transformers' and TRL's trainers share.

    `best` is the metric that picks the checkpoint to keep; losses and perplexities are best low.
    """
    training = settings.training
    by = "steps" if training.eval_steps else "epoch"
    # Older versions of transformers do not evaluate at the last step beside these.
    every = training.eval_steps and min(training.eval_steps, training_steps(settings, rows))
    # It is the launcher's, or an earlier run's in this process, and would go before the dtype.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    return {
        "output_dir": str(checkpoints),
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.eval_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "learning_rate": training.learning_rate,
        "warmup_steps": warmup_steps(settings, rows),
        "weight_decay": training.weight_decay,
        "optim": training.optimizer,
        "max_grad_norm": training.max_grad_norm,
        "lr_scheduler_type": training.scheduler,
        "gradient_checkpointing": training.gradient_checkpointing,
        # Reentrant checkpointing cannot train a pair that several layers share under DDP.
        "gradient_checkpointing_kwargs": (
            {"use_reentrant": False} if training.gradient_checkpointing else None
        ),
        # Said outright, since bfloat16 is refused where a GPU is expected and there is none.
        "use_cpu": not has_accelerator(),
        "bf16": base.arithmetic == torch.bfloat16,
        "fp16": base.arithmetic == torch.float16,
        "logging_steps": training.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a loss that is no number stops the run instead
        "eval_strategy": by if held_out else "no",
        "eval_steps": every,
        "save_strategy": by,
        "save_steps": every or 500,
        "save_total_limit": training.save_limit,
        "load_best_model_at_end": held_out,
        "metric_for_best_model": best if held_out else None,
        "greater_is_better": sign_of(best) > 0 if held_out else None,
        # Looking for parameters without a gradient costs time, and only stages leave some.
        "ddp_find_unused_parameters": bool(training.stages or training.frozen_levels),
        "log_level_replica": "error",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": settings.seed,
        # TensorBoard's files belong to the run folder: `callbacks` adds it.
        "report_to": [its for its in training.report_to if its != TENSORBOARD] or "none",
        "run_name": Path(settings.output).name,
        # The count of evaluations without a better one, for a run that is resumed.
        "restore_callback_states_from_checkpoint": True,
        "disable_tqdm": True,
    }


def training_steps(settings: Settings, rows: int) -> int:
    """The optimiser steps of a run over `rows` rows (packed ones, where they are packed)."""
    training = settings.training
    batches = math.ceil(rows / (training.batch_size * counted_processes()))
    an_epoch = math.ceil(batches / training.gradient_accumulation)
    return training.max_steps or math.ceil(an_epoch * training.epochs)


def warmup_steps(settings: Settings, rows: int) -> int:
    """The steps that warm up, of a run over `rows` rows (packed ones, where they are packed)."""
    return math.ceil(training_steps(settings, rows) * settings.training.warmup_ratio)


def quieten(trainer: Trainer) -> None:
    """Take away what the trainer would print; `ShowProgress` says it better."""
    trainer.remove_callback(PrinterCallback)
