"""What a run leaves in its folder: weights, metrics, curves, plan and card."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from msplora.analysis.history import RECORD
from msplora.versions import versions

from .devices import is_main_process, is_sharded, wait_for_everyone
from .job import Job
from .model_card import model_card
from .peft_methods import has_adapter, ranks_change
from .preview import plan_record, plan_text
from .progress import plain_metrics
from .run_folder import BEFORE, HISTORY, METRICS, RunFolder
from .saved_adapter import adapter_numbers, save_trained
from .scored_on import ScoredOn
from .settings import Settings


def measured(state: Any, job: Job, folder: RunFolder) -> dict[str, Any]:
    """The content of metrics.json: before, each evaluation, and the one that was kept."""
    judged = [
        {"epoch": entry.get("epoch", 0.0), "step": entry["step"], **_in_order(plain_metrics(entry))}
        for entry in state.log_history
        if "eval_loss" in entry
    ]
    evaluations = [entry for entry in judged if entry["step"] > 0]
    before = next((entry for entry in judged if entry["step"] == 0), None)
    if before is None and (folder.working / BEFORE).is_file():
        before = json.loads((folder.working / BEFORE).read_text(encoding="utf-8"))
    scored_on = ScoredOn.of(job)
    best: dict[str, Any] = {"epoch": state.epoch, "step": state.global_step}
    if job.held_out:
        # Not `best_global_step`, which older versions of transformers lack.
        step = int(state.best_model_checkpoint.rpartition("-")[2])
        best = next(entry for entry in evaluations if entry["step"] == step)
    return {
        "metric_for_best": job.best if job.held_out else None,
        "scored_on": asdict(scored_on) if scored_on else None,
        "before": before,
        "best": best,
        "evaluations": evaluations,
        "max_steps": state.max_steps,
        "trainable": job.adapted.trainable.total,
        "gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def forget_peak() -> None:
    """Measure the memory of a GPU anew: of the run that begins, not of those before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def write_weights(folder: RunFolder, job: Job, trainer: Any) -> Path:
    """Save what was trained, and what its use needs beside it; return where.

    Every process has to call it: where they share the weights out, each gives its part.
    """
    weights = folder.working / weights_folder(job.record.settings)
    if is_main_process() and weights.exists():
        shutil.rmtree(weights)  # of an attempt that was killed while it wrote
    state_dict = None
    if is_sharded(trainer.accelerator):
        state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if is_main_process():
        save_trained(trainer.accelerator.unwrap_model(trainer.model), weights, state_dict)
        job.base.tokenizer.save_pretrained(weights)
        job.record.save(weights)
    wait_for_everyone()
    return weights


def write_records(
    folder: RunFolder, weights: Path, job: Job, trainer: Any, metrics: dict[str, Any]
) -> None:
    """Write the numbers, curves and cards of a run beside its weights."""
    from .loss_plot import draw_loss  # matplotlib takes a second to import

    settings, adapted, here = job.record.settings, job.adapted, folder.working
    history = [
        {key: value for key, value in entry.items() if not key.startswith("eval_")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    folder.write_json(METRICS, metrics)
    folder.write_json(HISTORY, [_as_json(its) for its in trainer.state.log_history])
    if (folder.checkpoints / RECORD).is_file():
        shutil.copy(folder.checkpoints / RECORD, here / RECORD)
    folder.write_json("versions.json", versions())
    folder.write_json("plan.json", plan_record(adapted, settings.method))
    (here / "plan.txt").write_text(plan_text(adapted, settings.method), encoding="utf-8")
    judged = [entry for entry in [metrics["before"], *metrics["evaluations"]] if entry]
    draw_loss(history, judged, job.best, here / "loss.png")
    saved = None
    if ranks_change(settings.method):
        saved = adapter_numbers(weights, adapted.model.base_model.prefix)
    card = model_card(settings, adapted, metrics, versions(), folder.path, saved)
    (here / "README.md").write_text(card, encoding="utf-8")
    (weights / "README.md").write_text(card, encoding="utf-8")


def _in_order(entry: dict[str, Any]) -> dict[str, Any]:
    """By keys in order: those of an entry that comes from a checkpoint are."""
    return dict(sorted(entry.items()))


def _as_json(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of the loss curve; a norm that is no number, as in float16 where a step was skipped,
    is null.
    """
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in _in_order(entry).items()
    }


def weights_folder(settings: Settings) -> str:
    """The subfolder that holds what was trained."""
    return "adapter" if has_adapter(settings.method) else "model"
