"""What a run changes of a Trainer, transformers' own or TRL's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .adalora import is_adalora, take_ranks_of
from .learning_rates import parameter_groups
from .methods import WITHOUT_B
from .settings import Settings


class RunTrainer(Trainer):
    """Stands before the class of a trainer: ``class SFT(RunTrainer, SFTTrainer)``.

    The optimiser is made as the trainer makes its own, under FSDP and DeepSpeed too, but over the
    groups of `parameter_groups`. `settings` and `head` have to be set before it trains.
    """

    settings: Settings
    head: tuple[str, ...]

    def __init__(self, *positional: Any, args: Any, **named: Any) -> None:
        # A process has one device. Of all that are there transformers would make a batch as many
        # times as large, by nn.DataParallel, which TRL refuses.
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(*positional, args=args, **named)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimiser, once."""
        if self.optimizer is None:
            model = self.model if model is None else model
            make, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = make(settings_groups(model, self.settings, self.head), **options)
        return self.optimizer

    def _load_best_model(self) -> None:
        if is_adalora(self.model):
            take_ranks_of(self.model, Path(self.state.best_model_checkpoint or ""))
        super()._load_best_model()


def settings_groups(
    model: nn.Module, settings: Settings, head: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The parameter groups that a run's settings ask for."""
    training = settings.training
    pyramid = settings.method == "msplora"
    head_factor = training.head_learning_rate_factor
    if training.head_learning_rate is not None:
        head_factor = training.head_learning_rate / training.learning_rate
    return parameter_groups(
        model,
        training.learning_rate,
        weight_decay=training.weight_decay,
        level_factors=training.level_learning_rate_factors if pyramid else None,
        b_factor=1.0 if settings.method in WITHOUT_B else training.b_learning_rate_factor,
        head_factor=head_factor,
        head=head,
    )
