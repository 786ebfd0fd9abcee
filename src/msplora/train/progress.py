"""A progress bar, a line per evaluation, and a halt where the loss is no number."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from msplora.errors import MSPLoraError


class TrainingDiverged(MSPLoraError):
    """The loss is no longer a number."""

    exit_code = 3
    """A rate too high is no mistake in the config: what runs many has to tell the two apart."""


class NoNumber(MSPLoraError):
    """The loss is no number before anything was trained."""


class ShowProgress(TrainerCallback):
    """Replaces the Trainer's own bar and its printed dictionaries."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the bar, at the step a resumed run is at."""
        bar = self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.task = bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, shown=""
        )
        bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the loss, and stop where it is not finite: no later step can repair it."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise self._diverged(f"the training loss is {loss}", args, state)
        if self.bar:
            self.bar.update(self.task, shown=f"epoch {state.epoch:.2f} · loss {loss:.4f}")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        """Print what the evaluation found, and stop where it is no number."""
        loss = (metrics or {}).get("eval_loss", 0.0)
        if not math.isfinite(loss) and state.global_step == 0:
            self.stop()
            raise NoNumber(
                f"the held-out loss is {loss} before the first step: the base itself gives no "
                f"number on these rows, and no learning rate would help. Is the base whole? And is "
                f"dtype what it was made for? In float16 many models overflow; bfloat16 and "
                f"float32 do not."
            )
        if not math.isfinite(loss) and self.bar:
            raise self._diverged(f"the held-out loss is {loss}", args, state)
        if self.bar:
            self.console.print(f"epoch {state.epoch or 0:.2f}  {show_metrics(metrics or {})}")

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Take the bar away. The last step may have spoilt weights no loss was computed with."""
        bad = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not bool(parameter.isfinite().all())
        ]
        if bad:
            raise self._diverged(
                f"{len(bad)} tensors hold no numbers, such as {bad[0]},", args, state
            )
        self.stop()

    def _diverged(self, what: str, args: Any, state: Any) -> TrainingDiverged:
        self.stop()
        return TrainingDiverged(
            f"{what} at step {state.global_step}. Lower training.learning_rate (now "
            f"{args.learning_rate:g}) or raise training.warmup_ratio, and start anew with --force."
        )

    def stop(self) -> None:
        """Take the bar away, also where training was interrupted."""
        if self.bar:
            self.bar.stop()
            self.bar = None


def plain_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation without the trainer's prefix and without its timings."""
    return {
        key.removeprefix("eval_"): value
        for key, value in metrics.items()
        if key.startswith("eval_")
        and not key.endswith(("_runtime", "_per_second", "_preparation_time"))
    }


def show_metrics(metrics: dict[str, Any]) -> str:
    """The metrics on one line."""
    return "  ".join(
        f"{key} {value:.4f}"
        for key, value in plain_metrics(metrics).items()
        if isinstance(value, float)
    )
