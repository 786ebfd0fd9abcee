"""One training run, from settings to a complete run folder."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError

from msplora.errors import MSPLoraError
from msplora.folders import error_number, is_full

from .absolute_paths import with_absolute_paths
from .base_model import LoadBase, load_base
from .callbacks import add_callbacks, check_trackers
from .checkpoints import find_newest
from .devices import check_started, is_main_process, join, wait_for_everyone, world_size
from .disk_space import check_space, free_space
from .init_from import check_task
from .job import Job
from .methods import check_levels
from .next_steps import next_steps
from .peft_methods import check_one_process
from .preview import show_preview, show_sample, show_warnings
from .progress import ShowProgress, plain_metrics
from .quiet import quiet_libraries
from .results import forget_peak, measured, write_records, write_weights
from .resumable import make_resumable
from .run_folder import BEFORE, DATA, Resume, RunFolder
from .self_check import check_trained
from .settings import Settings
from .stopping import Interrupted, Stopped, StopSignals

_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class NotWritten(MSPLoraError):
    """The disk is full, or the run folder cannot be written to."""


class EndedFromOutside(MSPLoraError):
    """The system refused something else than writing the run, such as a tracker's connection."""


def train_run(
    settings: Settings,
    resume: Resume = False,
    force: bool = False,
    console: Console | None = None,
    results: Console | None = None,
) -> Path:
    """Train, and return the run folder.

    `console` shows how it is getting on; `results` what came out and what to look at, on the same
    one where it is left out.

    Everything that can be refused is refused before the folder is made. A run that is interrupted
    leaves `<output>.unfinished` behind, which `resume` continues to the same result; "auto" starts
    one where there is none, and does nothing where it is complete.

    Raises:
        ConfigError: the settings, or their data, are for no run; or `devices.processes` is not
            how many processes call this together, or these are too many for the method.
        Interrupted: Ctrl-C or SIGTERM. A checkpoint was saved, and the message says how to go on.
        NotWritten: the disk is full. The checkpoints before are whole.
        EndedFromOutside: another error of the system, such as a connection's.
        NoNumber: the loss is none before the first step.
    """
    check_started(settings.devices)
    check_one_process(settings.method, world_size())
    join()
    forget_peak()
    console = console or Console()
    results = results or console
    if not is_main_process():
        console = results = Console(quiet=True)
    settings = with_absolute_paths(settings)
    folder = RunFolder(settings, resume, force)
    if folder.is_complete or (folder.resumes and folder.lacks_only_its_name):
        return _already_complete(folder, results)
    with quiet_libraries():
        transformers.set_seed(settings.seed)
        job = prepare_job(settings)
        notes = check_space(job, folder.path)
        show_preview(job, console)
        if job.check:
            show_warnings(job.check, results)
        show_sample(job, console)
        with StopSignals(tells=is_main_process()) as stop:
            metrics, warnings = _run(job, folder, notes, stop, console)
    _report(results, folder.path, job, metrics)
    for what, command in next_steps(settings, folder.path, job.adapted):
        console.print(f"  {what:9}", command, markup=False, highlight=False, soft_wrap=True)
    for warning in warnings:
        results.print(f"[bold red]Look:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    return folder.path


def _run(
    job: Job, folder: RunFolder, notes: list[str], stop: StopSignals, console: Console
) -> tuple[dict[str, Any], list[str]]:
    """Everything that writes, with what is to be said where it is stopped."""
    try:
        wait_for_everyone()  # all have looked at what is there
        if is_main_process():
            notes = [*notes, *folder.begin()]
            if job.check:
                folder.write_json(DATA, job.check.to_dict())
        wait_for_everyone()
        for note in notes:
            console.print(f"• {note}", highlight=False, markup=False, soft_wrap=True)
        trainer = job.make_trainer(folder.checkpoints)
        make_resumable(trainer, stop, job.record.settings.training.save_steps)
        _train(trainer, job, folder, console)
        metrics = measured(trainer.state, job, folder)
        weights = write_weights(folder, job, trainer)
        warnings = check_trained(trainer, job, weights, metrics)
        if is_main_process():
            write_records(folder, weights, job, trainer, metrics)
            folder.finish()
        wait_for_everyone()
        return metrics, warnings
    except Stopped:
        raise Interrupted(
            f"Stopped by {stop.name}. {_saved(folder)} To go on: {folder.go_on}",
            stop.number or signal.SIGTERM,
        ) from None
    except KeyboardInterrupt:
        raise Interrupted(
            f"Stopped at once by Ctrl-C. {_saved(folder)} To go on: {folder.go_on}", signal.SIGINT
        ) from None
    except (OSError, SafetensorError) as error:  # safetensors' own errors hide a full disk
        raise _ended(error, folder) from error
    finally:
        folder.release()


def _ended(error: OSError | SafetensorError, folder: RunFolder) -> MSPLoraError:
    """What is to be said of an error of the system: of the disk, or of something else."""
    file = getattr(error, "filename", None)
    inside = isinstance(file, str) and Path(file).is_relative_to(folder.working)
    if not inside and error_number(error) not in _OF_A_DISK:
        what = f"the run was ended by an error that is not its own: {type(error).__name__}: {error}"
        return EndedFromOutside(f"{what}. {_saved(folder)} To go on: {folder.go_on}")
    what = f"the run could not be written in {folder.working}: {error}"
    if is_full(error):
        return NotWritten(
            f"{what}; {free_space(folder.path)} {_saved(folder)} Free some space; then to go on: "
            f"{folder.go_on}"
        )
    return NotWritten(f"{what}. {_saved(folder)} Once it can be, to go on: {folder.go_on}")


def _saved(folder: RunFolder) -> str:
    newest = find_newest(folder.checkpoints).newest
    if newest is None:
        return "No checkpoint had been saved yet, so it will start from the beginning."
    return f"The last checkpoint is {newest.path}, of step {newest.step}."


def _already_complete(folder: RunFolder, console: Console) -> Path:
    wait_for_everyone()  # all have looked at what is there
    if is_main_process():
        if folder.is_complete:
            folder.clear()
            said = f"The run in {folder.path} is complete; there is nothing to do."
        else:
            said = f"The run was complete but for its name; it is now in {folder.finish()}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    wait_for_everyone()
    return folder.path


def prepare_job(settings: Settings, load: LoadBase = load_base) -> Job:
    """Read and check all that the run needs, by its task; `load` gives it the base model."""
    check_trackers(settings)
    check_task(settings)
    check_levels(settings)
    prepare: Callable[[Settings, LoadBase], Job]
    if settings.task == "sft":
        from .sft import prepare
    elif settings.task == "dpo":
        from .dpo import prepare
    elif settings.task == "image-classification":
        from .image_classification import prepare
    else:
        from .classification import prepare
    return prepare(settings, load)


def _train(trainer: Any, job: Job, folder: RunFolder, console: Console) -> None:
    progress = ShowProgress(console)
    trainer.add_callback(progress)
    settings, tell = job.record.settings, partial(console.print, highlight=False, markup=False)
    add_callbacks(trainer, settings, job.adapted, folder.working, tell)
    checkpoint = folder.last_checkpoint
    if checkpoint is None and job.held_out:
        if world_size() == 1:
            before = plain_metrics(trainer.evaluate())
            folder.write_json(BEFORE, {"epoch": 0.0, "step": 0, **before})
        else:
            # accelerate takes a model that was evaluated for one that is ready for training too,
            # and each process would train for itself.
            trainer.args.eval_on_start = True
    if trainer.stop_is_asked():
        raise Stopped
    # Again, so that what was measured before leaves no trace in the random numbers.
    transformers.set_seed(settings.seed)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.stop()


def _report(console: Console, run: Path, job: Job, metrics: dict[str, Any]) -> None:
    if job.held_out:
        name, best = job.best, metrics["best"]
        before = (metrics["before"] or {}).get(name)
        change = f" (before training {before:.4f})" if before is not None else ""
        console.print(
            f"Best {name}: [bold]{best[name]:.4f}[/] at epoch {best['epoch']:.2f}{change}"
        )
    console.print(f"The run is in {run}", markup=False, highlight=False, soft_wrap=True)
