"""One training run, from settings to a complete run folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from safetensors import SafetensorError

from msplora.errors import MSPLoraError
from msplora.loading import resolve_source
from msplora.versions import versions

from .data_sources import absolute_sources
from .job import Job
from .model_card import model_card
from .next_steps import next_steps
from .preview import plan_record, plan_text, show_preview
from .progress import ShowProgress, plain_metrics
from .quiet import quiet_libraries
from .run_folder import BEFORE, DATA, METRICS, RunFolder
from .settings import Settings


class Interrupted(MSPLoraError):
    """The run was stopped by hand; its checkpoints are kept."""


class NotWritten(MSPLoraError):
    """The disk is full, or the run folder cannot be written to."""


def train_run(
    settings: Settings,
    resume: bool = False,
    force: bool = False,
    console: Console | None = None,
) -> Path:
    """Train, and return the run folder.

    Everything that can be refused is refused before the folder is made. A run that is interrupted
    leaves `<output>.unfinished` behind, which `resume` continues to the same result.
    """
    console = console or Console()
    settings = with_absolute_paths(settings)
    folder = RunFolder(settings, resume, force)
    with quiet_libraries():
        transformers.set_seed(settings.seed)
        job = _prepare(settings)
        show_preview(job, console)
        try:
            folder.begin()
            if job.check:
                folder.write_json(DATA, job.check.to_dict())
            trainer = job.make_trainer(folder.checkpoints)
            _train(trainer, job, folder, console)
            metrics = _metrics(trainer.state, job, folder)
            _write(folder, job, trainer, metrics)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped by hand. What was saved is in {folder.working}: the same command with "
                f"--resume continues from there."
            ) from None
        except (OSError, SafetensorError) as error:
            raise NotWritten(
                f"the run could not be written in {folder.working}: {error}. Free some space; the "
                f"same command with --resume goes on from the last whole checkpoint."
            ) from error
    run = folder.finish()
    _report(console, settings, run, job, metrics)
    return run


def with_absolute_paths(settings: Settings) -> Settings:
    """The settings with every local path made absolute, so that they hold from any folder."""
    settings = settings.model_copy(deep=True)
    settings.model = resolve_source(settings.model)
    if settings.tokenizer:
        settings.tokenizer = resolve_source(settings.tokenizer, "tokenizer")
    settings.output = _absolute(settings.output)
    if settings.init_from:
        settings.init_from = _absolute(settings.init_from)
    for key in ("train", "validation"):
        sources = absolute_sources(getattr(settings.data, key), f"data.{key}")
        setattr(settings.data, key, sources)
    for key in ("path", "chat_template"):
        if getattr(settings.data, key):
            setattr(settings.data, key, _absolute(getattr(settings.data, key)))
    return settings


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _prepare(settings: Settings) -> Job:
    prepare: Callable[[Settings], Job]
    if settings.task == "sft":
        from .sft import prepare
    else:
        from .classification import prepare
    return prepare(settings)


def _train(trainer: Any, job: Job, folder: RunFolder, console: Console) -> None:
    progress = ShowProgress(console)
    trainer.add_callback(progress)
    checkpoint = folder.last_checkpoint()
    if checkpoint is None and job.held_out:
        before = plain_metrics(trainer.evaluate())
        folder.write_json(BEFORE, {"epoch": 0.0, "step": 0, **before})
    # Again, so that what was measured before leaves no trace in the random numbers.
    transformers.set_seed(job.record.settings.seed)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.stop()


def _metrics(state: Any, job: Job, folder: RunFolder) -> dict[str, Any]:
    """The content of metrics.json: before, each evaluation, and the one that was kept."""
    evaluations = [
        {"epoch": entry["epoch"], "step": entry["step"], **plain_metrics(entry)}
        for entry in state.log_history
        if "eval_loss" in entry and entry["step"] > 0
    ]
    before_file = folder.working / BEFORE
    before = None
    if before_file.is_file():
        before = json.loads(before_file.read_text(encoding="utf-8"))
    best: dict[str, Any] = {"epoch": state.epoch, "step": state.global_step}
    if job.held_out:
        # Not `best_global_step`, which older versions of transformers lack.
        step = int(state.best_model_checkpoint.rpartition("-")[2])
        best = next(entry for entry in evaluations if entry["step"] == step)
    return {
        "metric_for_best": job.best if job.held_out else None,
        "before": before,
        "best": best,
        "evaluations": evaluations,
        "trainable": job.adapted.trainable.total,
    }


def _write(folder: RunFolder, job: Job, trainer: Any, metrics: dict[str, Any]) -> None:
    from .loss_plot import draw_loss  # matplotlib takes a second to import

    settings, adapted, here = job.record.settings, job.adapted, folder.working
    history = [
        {key: value for key, value in entry.items() if not key.startswith("eval_")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    folder.write_json(METRICS, metrics)
    folder.write_json("log_history.json", trainer.state.log_history)
    folder.write_json("versions.json", versions())
    folder.write_json("plan.json", plan_record(adapted, settings.method))
    (here / "plan.txt").write_text(plan_text(adapted, settings.method), encoding="utf-8")
    judged = [entry for entry in [metrics["before"], *metrics["evaluations"]] if entry]
    draw_loss(history, judged, job.best, here / "loss.png")

    weights = here / weights_folder(settings)
    if weights.exists():
        shutil.rmtree(weights)  # of an attempt that was killed while it wrote
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(weights)
    job.base.tokenizer.save_pretrained(weights)
    job.record.save(weights)
    card = model_card(settings, adapted, metrics, versions(), folder.path)
    (here / "README.md").write_text(card, encoding="utf-8")
    (weights / "README.md").write_text(card, encoding="utf-8")


def weights_folder(settings: Settings) -> str:
    """The subfolder that holds what was trained."""
    return "adapter" if settings.method in ("msplora", "lora") else "model"


def _report(
    console: Console, settings: Settings, run: Path, job: Job, metrics: dict[str, Any]
) -> None:
    if job.held_out:
        name, best = job.best, metrics["best"]
        before = (metrics["before"] or {}).get(name)
        change = f" (before training {before:.4f})" if before is not None else ""
        console.print(
            f"Best {name}: [bold]{best[name]:.4f}[/] at epoch {best['epoch']:.2f}{change}"
        )
    console.print(f"The run is in {run}", markup=False, highlight=False, soft_wrap=True)
    for what, command in next_steps(settings, run, job.adapted.rank):
        console.print(f"  {what:9}", command, markup=False, highlight=False, soft_wrap=True)
