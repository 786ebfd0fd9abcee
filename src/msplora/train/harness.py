"""Judge a run by tasks of lm-evaluation-harness, the model as it is in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from msplora.errors import MSPLoraError, nearest

from .quiet import quiet_libraries
from .saved_run import open_run


class HarnessError(MSPLoraError):
    """A task that is not there, or a run that such tasks cannot judge."""


def judge(
    path: Path | str,
    tasks: list[str],
    include_path: Path | None = None,
    base: str | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Return task → metric → value, as lm-evaluation-harness computes them.

    Args:
        path: run folder, or the folder of an adapter or a model.
        tasks: names of tasks or groups of tasks.
        include_path: a folder of task files of one's own (YAML), beside those that come with it.
        base: the base model, where the recorded one has moved.
        batch_size: rows per step; the run's own by default.

    Raises:
        HarnessError: an unknown task, or a run that is no language model.
    """
    with quiet_libraries():
        manager = _task_manager(tasks, include_path)
        run = open_run(path, base)
        if run.settings.task not in ("sft", "dpo"):
            raise HarnessError(
                f"{path} is a run of {run.settings.task}, and the harness judges language models. "
                f"Leave --harness out: msplora eval {path} gives its metrics."
            )
        model = HFLM(
            pretrained=run.model,
            tokenizer=run.base.tokenizer,
            batch_size=batch_size or run.settings.training.eval_batch_size,
        )
        found: Any = simple_evaluate(model=model, tasks=list(tasks), task_manager=manager)
    return {
        "run": str(path),
        "tasks": {task: _plain(its) for task, its in found["results"].items()},
    }


def _task_manager(tasks: list[str], include_path: Path | None) -> TaskManager:
    """What finds the tasks: one's own files first, for the harness' are thousands to read."""
    if include_path is not None:
        if not include_path.is_dir():
            raise HarnessError(f"--include-path: there is no folder {include_path}.")
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if not _missing(own, tasks):
            return own
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    missing = _missing(manager, tasks)
    if missing:
        raise HarnessError(
            f"the harness has no task {missing[0]!r}.{nearest(missing[0], manager.all_tasks)} "
            f"`lm-eval ls tasks` lists them; --include-path DIR adds your own."
        )
    return manager


def _missing(manager: TaskManager, tasks: list[str]) -> list[str]:
    return [task for task in tasks if not manager.match_tasks([task])]


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers of a task; `acc,none` is `acc`, and a filter that there is stays in the name."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
