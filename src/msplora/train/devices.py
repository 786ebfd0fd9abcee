"""Several processes, by `accelerate launch`: how a run starts itself again, and who it then is."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from msplora.errors import ConfigError, MSPLoraError

from .settings import DeviceSettings
from .stopping import Interrupted, name_of

_FSDP2 = (
    "--use_fsdp",
    "--fsdp_version=2",
    "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP",
    "--fsdp_reshard_after_forward=true",
    # Checkpoints hold the whole adapter, and can be read by any number of processes.
    "--fsdp_state_dict_type=FULL_STATE_DICT",
    "--fsdp_cpu_ram_efficient_loading=false",
)
_ZERO = ("--use_deepspeed", "--zero3_init_flag=false")
PRESETS: dict[str, tuple[str, ...]] = {
    "ddp": ("--multi_gpu",),
    "fsdp2": _FSDP2,
    "zero2": (*_ZERO, "--zero_stage=2"),
    "zero3": (*_ZERO, "--zero_stage=3", "--zero3_save_16bit_model=true"),
}
"""Strategy → what `accelerate launch` is told of it."""


class WorkerFailed(MSPLoraError):
    """A process of the run ended with an error of its own."""


def world_size() -> int:
    """How many processes train together; whatever launcher started them says it this way."""
    return int(os.environ.get("WORLD_SIZE", "1"))


_PLANNED: ContextVar[int | None] = ContextVar("planned", default=None)


@contextmanager
def planned(processes: int) -> Iterator[None]:
    """Count steps as of so many processes, of which none has been started."""
    token = _PLANNED.set(processes)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def counted_processes() -> int:
    """How many processes a schedule is for: those that train together, or that are planned."""
    return _PLANNED.get() or world_size()


def is_worker() -> bool:
    """Whether a launcher started this process: it does not start others then."""
    return "LOCAL_RANK" in os.environ


def is_main_process() -> bool:
    """Whether this is the process that writes and prints."""
    return process_index() == 0


def process_index() -> int:
    """Which of the processes this one is, from 0."""
    # A rank alone says nothing: clusters give one to commands that train with nobody.
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def join() -> None:
    """Meet the other processes, where a launcher started several.

    Raises:
        ConfigError: the environment speaks of several, and of nothing to meet them by.
    """
    missing = [name for name in ("RANK", "MASTER_ADDR") if name not in os.environ]
    if world_size() > 1 and missing:
        raise ConfigError(
            f"WORLD_SIZE={world_size()} is set without {' and '.join(missing)}: no "
            f"launcher started this process. Take WORLD_SIZE out of the environment, or start by "
            f"`accelerate launch` or torchrun."
        )
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=not has_accelerator())


def wait_for_everyone() -> None:
    """Go on when every process of the run has come here."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def is_sharded(accelerator: Any) -> bool:
    """Whether each process holds only a share of the weights."""
    from accelerate.utils import DistributedType

    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def sum_over_processes(*numbers: float) -> list[float]:
    """Each number summed over all processes, which have to ask together."""
    if world_size() == 1:
        return list(numbers)
    import torch
    from accelerate import PartialState

    sums = torch.tensor(numbers, dtype=torch.float64, device=PartialState().device)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def has_accelerator() -> bool:
    """Whether there is anything but a CPU to compute on."""
    import torch

    return (
        torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
    )


def check_devices(devices: DeviceSettings) -> None:
    """Refuse what this machine has no devices or no library for, before anything is started.

    Raises:
        ConfigError: there are too few GPUs, or the strategy cannot run here.
    """
    import torch

    if devices.strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"devices.strategy = {devices.strategy!r} needs deepspeed, which is not installed: "
            f"pip install deepspeed. Strategy fsdp2 shards alike and needs nothing more."
        )
    if torch.cuda.is_available():
        there = torch.cuda.device_count()
        if devices.processes > there:
            raise ConfigError(
                f"devices.processes = {devices.processes}, but this machine has {there} GPUs. Use "
                f"{there} or fewer; for more, start the command on each machine by accelerate "
                f"launch."
            )
    elif devices.strategy != "ddp":
        raise ConfigError(
            f"devices.strategy = {devices.strategy!r} shards over GPUs, and this machine has none. "
            f"Use strategy ddp on a CPU."
        )


def check_started(devices: DeviceSettings) -> None:
    """Refuse to train in other than the processes that the settings ask for.

    One process is what they say where nothing is asked: then any launcher's number is right.

    Raises:
        ConfigError: there are more, or fewer.
    """
    if devices.processes not in (1, world_size()):
        raise ConfigError(
            f"devices.processes = {devices.processes}, and {world_size()} train here. Start the "
            f"run by `msplora train`, which starts as many; or leave devices.processes out, and "
            f"start it by a launcher of your own."
        )


def launch(devices: DeviceSettings, arguments: Sequence[str]) -> int:
    """Run `msplora ARGUMENTS` in several processes; return the exit code.

    A signal to stop is theirs: they save, say how to go on, and their exit code is returned.

    Raises:
        ConfigError: as `check_devices`.
        Interrupted: a signal ended them before they could say so.
        WorkerFailed: a process other than the first, which prints its own errors, failed first.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from .stopping_workers import PassesOn

    check_devices(devices)
    command = launch_command_parser().parse_args(launch_arguments(devices, arguments))
    if logging.getLogger("msplora").getEffectiveLevel() > logging.DEBUG:
        # What it has to say of a process that failed, that process has said better.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    stop = PassesOn()
    try:
        with stop:
            launch_command(command)
    except SignalException as error:  # one that is not passed on, or that came as they started
        raise _stopped(error.sigval) from None
    except ChildFailedError as error:
        first = error.failures.get(0)
        if first and first.exitcode > 0:
            return first.exitcode  # it has said why
        rank, failure = error.get_first_failure()
        if stop.number and not 0 < failure.exitcode < 128:
            raise _stopped(stop.number) from None
        raise WorkerFailed(
            f"process {rank} of {devices.processes} failed (exit code {failure.exitcode}): "
            f"{failure.message}"
        ) from None
    return 0


def _stopped(number: int) -> Interrupted:
    return Interrupted(
        f"Stopped by {name_of(number)}, before the run could say what it has saved. Give the same "
        f"command with --resume auto: it goes on from the last checkpoint, if there is one.",
        number,
    )


def launch_arguments(devices: DeviceSettings, arguments: Sequence[str]) -> list[str]:
    """What `accelerate launch` is given to run `msplora ARGUMENTS`.

    All of it is said outright, so that a configuration file of accelerate's changes nothing.
    """
    return [
        f"--num_processes={devices.processes}",
        "--num_machines=1",
        "--machine_rank=0",
        "--main_process_port=0",  # a free one
        "--mixed_precision=no",  # the trainer decides
        "--dynamo_backend=no",
        *PRESETS[devices.strategy],
        "--module",
        "msplora",
        *arguments,
    ]


def report_failure(error: BaseException) -> None:
    """Leave word of an error for the launcher, from a process that does not print.

    After a moment: mostly all fail alike, and the first process, which prints, is to be first.
    """
    time.sleep(2)
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
