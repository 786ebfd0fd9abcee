"""Early stopping that says so, and that leaves no stage out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from .stages import Stage, stage_ends


def stop_early(
    trainer: Any, patience: int, stages: Sequence[Stage], tell: Callable[[str], None]
) -> None:
    """Let a trainer stop after so many evaluations in a row without a better one.

    With stages they are counted in the last one only: stopped before, the levels of the stages to
    come would not have been trained at all.

    Args:
        trainer: transformers' or TRL's, about to train.
        patience: evaluations.
        stages: of the run, if it has some.
        tell: prints a line.
    """
    trainer.add_callback(EarlyStoppingCallback(patience))
    trainer.add_callback(_Watch(trainer.callback_handler, stages, tell))


class _Watch(TrainerCallback):
    """Beside transformers' own, whose place a new one takes where a checkpoint is loaded."""

    def __init__(self, handler: Any, stages: Sequence[Stage], tell: Callable[[str], None]) -> None:
        self.handler = handler
        self.stages = stages
        self.tell = tell

    @property
    def counts(self) -> EarlyStoppingCallback:
        """The one that counts."""
        found = (its for its in self.handler.callbacks if isinstance(its, EarlyStoppingCallback))
        return next(found)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count nothing of an earlier stage."""
        self._forget(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count nothing of an earlier stage, where epochs are evaluated."""
        self._forget(state, control)

    def _forget(self, state: Any, control: Any) -> None:
        ends = stage_ends(self.stages, state.max_steps) if self.stages else []
        if len(ends) > 1 and state.global_step <= ends[-2]:
            # An evaluation that follows at once adds one, or begins at 0 again.
            self.counts.early_stopping_patience_counter = -1 if control.should_evaluate else 0

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say where it ended, if it was for want of a better one."""
        waited = self.counts.early_stopping_patience_counter
        if state.global_step < state.max_steps and waited >= self.counts.early_stopping_patience:
            self.tell(
                f"stopped early at step {state.global_step} of {state.max_steps}: "
                f"{args.metric_for_best_model} was not better in {waited} evaluations in a row"
            )
