"""A trainer whose checkpoints are whole, and from which it goes on to the same bits.

transformers' own checkpoint lacks what was counted since the last entry of the loss curve, and
takes one of the last step for one that has steps to come. Both are made good here, for any of its
trainers and of TRL's.
"""

from __future__ import annotations

import errno
import json
import shutil
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from .checkpoints import WRITING, checkpoint_folder, prune, put, seal
from .stopping import (
    AFTER_THIS_EVALUATION,
    AFTER_THIS_STEP,
    BEFORE_THE_FIRST_STEP,
    IS_BEING_FINISHED,
    Stopped,
    StopSignals,
)

ALMOST_NOTHING = 2**26
"""Bytes: a disk with fewer free ones, where writing just failed, is full."""


def make_resumable(trainer: Trainer, stop: StopSignals, save_steps: int | None) -> None:
    """Let `trainer` save as `Resumable` does, besides when it would: on a stop, every some steps.

    The class is changed in place, so that no task's trainer can forget to ask for it.
    """
    kind = type(trainer)
    trainer.__class__ = type(kind.__name__, (Resumable, kind), {"__module__": kind.__module__})
    assert isinstance(trainer, Resumable)
    trainer.stop, trainer.extra_save_steps = stop, save_steps
    stop.what_follows = trainer.what_a_stop_waits_for
    # Its own way of deleting would take checkpoints that a damaged one has to be replaced by.
    trainer.keep, trainer.args.save_total_limit = trainer.args.save_total_limit or 1, None
    trainer.args.restore_callback_states_from_checkpoint = True
    trainer.add_callback(_GoOn(trainer))


class Resumable(Trainer):
    """Mixed into a trainer by `make_resumable`.

    A checkpoint is written after all else that its step calls for: logging, evaluating, and what
    follows the end of an epoch. So to resume is to go on with the next step.
    """

    stop: StopSignals
    extra_save_steps: int | None
    keep: int
    resumed_from: Path | None = None
    _writes = False
    _trains = False
    _evaluates = False
    _saved_at: int | None = None
    _resumed_at: int | None = None
    _complete = False
    _step_seen: int | None = None
    _unlogged_loss: torch.Tensor
    _carried_loss: float | None = None

    def train(self, resume_from_checkpoint: Any = None, *rest: Any, **more: Any) -> Any:
        """Train, from the beginning or from a checkpoint's folder."""
        self.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self._trains = True
        return super().train(resume_from_checkpoint, *rest, **more)

    def evaluate(self, *arguments: Any, **more: Any) -> dict[str, float]:
        """Evaluate, and know of it meanwhile: a stop waits for it."""
        self._evaluates = True
        try:
            return super().evaluate(*arguments, **more)
        finally:
            self._evaluates = False

    def what_a_stop_waits_for(self) -> str:
        """What is said to a signal that comes now."""
        if self._trains and self.state.max_steps and self._trained_to_the_end():
            return IS_BEING_FINISHED
        if self._evaluates:
            return AFTER_THIS_EVALUATION
        return AFTER_THIS_STEP if self._trains else BEFORE_THE_FIRST_STEP

    def go_on(self) -> None:
        """Take up what the checkpoint says beyond transformers' part, once that is loaded."""
        if self.resumed_from is None:
            return
        carried = json.loads((self.resumed_from / self._carried_name).read_text(encoding="utf-8"))
        self._resumed_at = self._saved_at = self.state.global_step
        self._complete = carried["complete"]
        self._globalstep_last_logged = carried["last_logged"]
        self._total_loss_scalar = carried["total_loss"]
        if self._complete:
            self._total_loss_scalar += carried["unlogged_loss"]
        else:
            self._carried_loss = carried["unlogged_loss"]
        # TRL averages its metrics from one entry to the next, and counts the tokens of the run.
        if hasattr(self, "_metrics"):
            self._metrics["train"].update(carried["metrics"])
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = carried["tokens"]
        assert self.model is not None
        self.model.train(carried["training"])
        best = self.state.best_global_step
        if best:  # by its path, which another folder for the output changes
            self.state.best_model_checkpoint = str(checkpoint_folder(self._checkpoints, best))

    def get_batch_samples(self, *arguments: Any, **more: Any) -> Any:
        """No batch where the checkpoint was of the last step: there is none left to train."""
        if self._complete:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*arguments, **more)

    def training_step(self, *arguments: Any, **more: Any) -> torch.Tensor:
        """One batch's loss; to the first is added what the checkpoint had not logged."""
        loss = super().training_step(*arguments, **more)
        if self._carried_loss is not None:
            loss, self._carried_loss = loss + self._carried_loss, None
        return loss

    def log(self, logs: dict[str, float], *rest: Any, **more: Any) -> None:
        """Log; the mean loss of the run is that of all its steps, not of those since a resume."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *rest, **more)

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: Any, trial: Any, *rest: Any, **more: Any
    ) -> None:
        step = self.state.global_step
        if step == self._resumed_at:
            return  # all that this step calls for was done before its checkpoint was written
        self._unlogged_loss = tr_loss
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *rest, **more)
        if self._end_of_epoch_follows():
            return
        stops = self.stop_is_asked() and not self._trained_to_the_end()
        due = self.extra_save_steps and step % self.extra_save_steps == 0
        if (stops or due) and self._saved_at != step:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if stops:
            raise Stopped

    def _end_of_epoch_follows(self) -> bool:
        """Whether this step is about to be followed by what the end of an epoch calls for."""
        step, first = self.state.global_step, self._step_seen != self.state.global_step
        self._step_seen = step
        ends = float(self.state.epoch or 0).is_integer() or self._trained_to_the_end()
        return first and (ends or self.control.should_epoch_stop)

    def _trained_to_the_end(self) -> bool:
        return self.state.global_step >= self.state.max_steps or self.control.should_training_stop

    def stop_is_asked(self) -> bool:
        """Whether any of the processes, which have to ask together, got a signal."""
        if self.args.world_size == 1:
            return self.stop.asked
        # A signal reaches the processes at different steps; they have to stop at the same one.
        asked = torch.tensor([int(self.stop.asked)], device=self.args.device)
        return bool(self.accelerator.gather(asked).any())

    @property
    def _checkpoints(self) -> Path:
        return Path(self.args.output_dir or "")

    @property
    def _carried_name(self) -> str:
        return f"unlogged_{self.args.process_index}.json"

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / WRITING) if self._writes else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside the others, and name it once it is whole."""
        step, best = self.state.global_step, self.state.best_global_step or None
        checkpoints, main = self._checkpoints, self.args.should_save
        beside = checkpoints / WRITING
        here = checkpoint_folder(beside, step)
        if main:
            shutil.rmtree(beside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._writes = True
        try:
            super()._save_checkpoint(model, trial)
            self._save_carried(here)
            if best:
                self.state.best_model_checkpoint = str(checkpoint_folder(checkpoints, best))
            self.accelerator.wait_for_everyone()
            if main:
                self.state.save_to_json(str(here / TRAINER_STATE_NAME))
                seal(here, step, best, self.args.world_size)
                put(here, checkpoints)
        except RuntimeError as error:
            if _failed_to_write(error):
                full = shutil.disk_usage(checkpoints).free < ALMOST_NOTHING
                number = errno.ENOSPC if full else errno.EIO  # torch does not pass it on
                raise OSError(number, f"torch could not write {here.name} to its end") from error
            raise
        finally:
            self._writes = False
            if main:
                shutil.rmtree(beside, ignore_errors=True)
        self._saved_at = step
        if main:
            prune(checkpoints, self.keep)
        self.accelerator.wait_for_everyone()

    def _save_carried(self, folder: Path) -> None:
        assert self.model is not None
        content = {
            "complete": self._trained_to_the_end(),
            "unlogged_loss": self._unlogged_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "total_loss": self._total_loss_scalar,
            "training": self.model.training,
            "metrics": dict(self._metrics["train"]) if hasattr(self, "_metrics") else {},
            "tokens": getattr(self, "_total_train_tokens", 0),
        }
        (folder / self._carried_name).write_text(json.dumps(content), encoding="utf-8")


def _failed_to_write(error: RuntimeError) -> bool:
    """Whether torch.save raised it, which has no error of its own for a full disk."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "torch.serialization" for frame, _ in frames)


class _GoOn(TrainerCallback):
    """Tells the trainer that transformers has loaded its part of the checkpoint."""

    def __init__(self, trainer: Resumable) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.go_on()
