"""`msplora train --dry-run`: what a run would train, take and leave, before it loads a weight."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import transformers

from msplora.errors import ConfigError

from .absolute_paths import with_absolute_paths
from .base_model import base_without_weights
from .devices import planned
from .disk_space import optimiser_bytes, saved_bytes
from .dry_run_devices import is_sharded, not_foreseen
from .estimate import Estimate, estimate
from .job import Job
from .measured import Measured, measure
from .memory_trace import Held, Peak
from .methods import Trainable
from .quantisation import can_be_quantised, is_quantised
from .quiet import quiet_libraries
from .rehearsal import Rows
from .run import prepare_job
from .settings import DeviceSettings, Settings
from .target import Target, find_target
from .trainer_arguments import training_steps, warmup_steps


@dataclass(frozen=True)
class Schedule:
    """How long the run is."""

    rows: int
    longest: int
    tokens_per_epoch: int
    rows_per_step: int
    """Of all processes together."""
    steps: int
    warmup_steps: int


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk: of what is trained, of a checkpoint, and of all while it trains."""

    weights: int
    checkpoint: int
    at_most: int


@dataclass(frozen=True)
class Remedy:
    """Settings that take less memory, and how much the run would need with them."""

    changes: Mapping[str, Any]
    needed: int


@dataclass(frozen=True)
class DryRun:
    """What a dry run found."""

    job: Job
    target: Target
    estimate: Estimate
    schedule: Schedule
    disk: Disk
    remedies: tuple[Remedy, ...]
    measured: Measured | None

    @property
    def trainable(self) -> Trainable:
        """How many numbers train."""
        return self.job.adapted.trainable

    @property
    def needed(self) -> int:
        """Bytes of the device, with what is taken beside the tensors."""
        return _needed(self.estimate, self.target, self.devices)

    @property
    def beside_tensors(self) -> int:
        """Bytes that a process takes beside its tensors."""
        return _beside_tensors(self.estimate, self.target)

    @property
    def devices(self) -> DeviceSettings:
        """What the run is spread over."""
        return self.job.record.settings.devices

    @property
    def fits(self) -> bool | None:
        """Whether the device has that much; None where that does not say it."""
        enough = self.needed <= self.target.capacity
        if is_sharded(self.devices) or (self.devices.device_map and not enough):
            return None
        return enough

    @property
    def error(self) -> float | None:
        """The estimated peak over the measured one, less 1."""
        return self.measured and self.estimate.peak.total / self.measured.peak - 1

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it; sizes in bytes."""
        evaluation = self.estimate.evaluation
        return {
            "device": {"name": self.target.name, "capacity": self.target.capacity},
            "fits": self.fits,
            "not_foreseen": not_foreseen(self.devices),
            "needed": self.needed,
            "trainable": {**asdict(self.trainable), "total": self.trainable.total},
            "training": _peak_record(self.estimate.training),
            "evaluation": evaluation and _peak_record(evaluation),
            "beside_tensors": self.beside_tensors,
            "schedule": asdict(self.schedule),
            "disk": asdict(self.disk),
            "remedies": [
                {"changes": dict(its.changes), "needed": its.needed} for its in self.remedies
            ],
            "measured": self.measured and {**asdict(self.measured), "error": self.error},
        }


def dry_run(settings: Settings, device: str | None = None, real: bool = False) -> DryRun:
    """Say what a run would take; nothing is written, and no weight is loaded.

    Args:
        settings: the run.
        device: what it has to fit on, as `find_target` reads it; where it would run if left out.
        real: load the weights after all, rehearse on this machine, and measure.

    Raises:
        MSPLoraError: what `train_run` would refuse, but for the output folder; or a measurement on
            a device that is not here.
    """
    settings = with_absolute_paths(settings)
    target = find_target(device)
    if real and not target.here:
        raise ConfigError(
            f"--measure takes the steps here, and {target.name} is not what this machine trains "
            f"on. Leave --device or --measure out."
        )
    devices = settings.devices
    if real and devices.processes > 1:
        raise ConfigError(
            f"--measure takes the steps in one process, and devices.processes is "
            f"{devices.processes}. Leave --measure out, or set devices.processes=1."
        )
    with quiet_libraries(), planned(devices.processes):
        job = _without_weights(settings, target)
        found = estimate(job, target.on_gpu)
        remedies = ()
        if _needed(found, target, devices) > target.capacity and not not_foreseen(devices):
            remedies = tuple(_remedies(job, target, found))
        measured = None
        if real:
            transformers.set_seed(settings.seed)
            measured = measure(prepare_job(settings))
        schedule = _schedule(settings, found.rows)
    return DryRun(job, target, found, schedule, disk_use(job), remedies, measured)


def _without_weights(settings: Settings, target: Target) -> Job:
    transformers.set_seed(settings.seed)
    with torch.device("meta"):
        return prepare_job(settings, partial(base_without_weights, on_gpu=target.on_gpu))


def _beside_tensors(found: Estimate, target: Target) -> int:
    peak = found.peak
    weights = peak.parts.get(Held.FROZEN, 0) + peak.parts.get(Held.TRAINED, 0)
    return target.overhead(peak.total, weights)


def _needed(found: Estimate, target: Target, devices: DeviceSettings) -> int:
    """Bytes of a GPU, which each process has for itself, or of the memory that all share."""
    each = found.peak.total + _beside_tensors(found, target)
    return each if target.on_gpu or is_sharded(devices) else each * devices.processes


def _remedies(job: Job, target: Target, found: Estimate) -> Iterator[Remedy]:
    """What takes less memory: each change alone, then all of them."""
    training = job.record.settings.training
    single: list[dict[str, Any]] = []
    if not training.gradient_checkpointing:
        single.append({"training.gradient_checkpointing": True})
    if training.batch_size > 1:
        halved = training.batch_size // 2
        more = math.ceil(training.batch_size * training.gradient_accumulation / halved)
        single.append({"training.batch_size": halved, "training.gradient_accumulation": more})
    judged = found.evaluation
    if judged and judged.total > 0.8 * found.training.total and training.eval_batch_size > 1:
        single.append({"training.eval_batch_size": training.eval_batch_size // 2})
    whole = not is_quantised(job.base.model)
    if job.base.arithmetic == torch.float32 and whole:
        single.append({"dtype": "bfloat16"})
    if whole and can_be_quantised(job.record.settings):
        single.append({"quantization": "4bit"})
    together: dict[str, Any] = {}
    for changes in single:
        together |= changes
    for changes in single + [together] * (len(single) > 1):
        with _changed(job.record.settings, changes):
            if "quantization" in changes:  # another base
                its, arithmetic = _without_weights(job.record.settings, target), None
            else:
                its, arithmetic = job, torch.bfloat16 if "dtype" in changes else None
            needed = _needed(
                estimate(its, target.on_gpu, arithmetic), target, job.record.settings.devices
            )
        yield Remedy(changes, needed)


@contextmanager
def _changed(settings: Settings, changes: Mapping[str, Any]) -> Iterator[None]:
    """Dotted keys with other values for a while."""
    before = {key: operator.attrgetter(key)(settings) for key in changes}
    try:
        _put(settings, changes)
        yield
    finally:
        _put(settings, before)


def _put(settings: Settings, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        setattr(operator.attrgetter(section)(settings) if section else settings, name, value)


def _schedule(settings: Settings, rows: Rows) -> Schedule:
    training = settings.training
    together = training.batch_size * training.gradient_accumulation * settings.devices.processes
    return Schedule(
        rows.count,
        rows.longest,
        rows.tokens,
        min(together, rows.count),
        training_steps(settings, rows.count),
        warmup_steps(settings, rows.count),
    )


def disk_use(job: Job) -> Disk:
    """What a job will write, without the tokenizer and what is small beside it."""
    model = job.adapted.model
    weights = saved_bytes(model)
    training = job.record.settings.training
    checkpoint = weights + optimiser_bytes(model, training.optimizer)
    # A new one is whole before an old one goes, the best stays beside those that the limit names,
    # and the weights are written when the last is.
    limit = training.save_limit
    at_most = max((limit + 2) * checkpoint, (limit + 1) * checkpoint + weights)
    return Disk(weights, checkpoint, at_most)


def _peak_record(peak: Peak) -> dict[str, Any]:
    parts = {held.value: size for held, size in peak.parts.items()}
    return {"total": peak.total, "where": peak.where, "parts": parts}
