"""What both trainers are told, from a run's settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer

from .base_model import Base
from .settings import Settings


def trainer_arguments(
    settings: Settings, base: Base, checkpoints: Path, rows: int, held_out: bool, best: str
) -> dict[str, Any]:
    """Return the arguments that transformers' and TRL's trainers share.

    `best` is the metric that picks the checkpoint to keep; losses and perplexities are best low.
    """
    training = settings.training
    by = "steps" if training.eval_steps else "epoch"
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
        "eval_steps": training.eval_steps,
        "save_strategy": by,
        "save_steps": training.eval_steps or 500,
        "save_total_limit": training.save_limit,
        "load_best_model_at_end": held_out,
        "metric_for_best_model": best if held_out else None,
        "greater_is_better": best not in ("loss", "perplexity") if held_out else None,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": settings.seed,
        "report_to": "none",
        "disable_tqdm": True,
    }


def has_accelerator() -> bool:
    """Whether a run here trains on something other than the CPU."""
    return (
        torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
    )


def warmup_steps(settings: Settings, rows: int) -> int:
    """The steps that warm up, of a run over `rows` rows (packed ones, where they are packed)."""
    training = settings.training
    batches = math.ceil(rows / training.batch_size)
    steps = math.ceil(batches / training.gradient_accumulation) * training.epochs
    return math.ceil((training.max_steps or steps) * training.warmup_ratio)


def optimizer(model: nn.Module, settings: Settings, head: tuple[str, ...]) -> torch.optim.Optimizer:
    """AdamW with no decay on biases and norms, and the head at its own rate."""
    training = settings.training
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # pyright: ignore
    heads = tuple(f"{name}." for name in head)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_head = name.removeprefix("base_model.model.").startswith(heads)
            groups.setdefault((in_head, name in decayed), []).append(parameter)
    rate = training.learning_rate
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": rate * training.head_learning_rate_factor if in_head else rate,
                "weight_decay": training.weight_decay if decays else 0.0,
            }
            for (in_head, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
        ],
        lr=rate,
    )


def quieten(trainer: Trainer) -> None:
    """Take away what the trainer would print; `ShowProgress` says it better."""
    trainer.remove_callback(PrinterCallback)
