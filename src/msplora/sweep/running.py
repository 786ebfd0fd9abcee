"""One run of a sweep: in a process of its own, or in this one; what it says goes to a file."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from msplora.errors import MSPLoraError
from msplora.train.interrupted import has_to_start_anew
from msplora.train.settings import Settings
from msplora.train.settings_file import write_settings
from msplora.train.stopping import AFTER_THIS_STEP, Interrupted, StopSignals

_DIVERGED = 3
"""The exit code of `TrainingDiverged`, whose module takes seconds to import."""
_FROM_OUTSIDE = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
"""What ends a process that has done nothing wrong itself, but perhaps taken too much memory."""
_BETWEEN_LOOKS = 0.5
"""Seconds between two looks at a run."""


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt at a run."""

    status: Literal["complete", "diverged", "failed", "rejected", "unfinished"]
    seconds: float
    error: str | None = None
    resident_bytes: int | None = None


class SweepSignals(StopSignals):
    """Hands a signal on to the process that is training; where none is, stops at once."""

    apart = False
    """Whether there is such a process, or is about to be."""
    _process: subprocess.Popen[bytes] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.what_follows = lambda: AFTER_THIS_STEP

    def follow(self, process: subprocess.Popen[bytes]) -> None:
        """Hand signals on to this process, one that came while it was started too."""
        self._process = process
        if self.number is not None:
            self._hand_on(self.number)

    def forget(self) -> None:
        """There is no such process any more."""
        self.apart, self._process = False, None

    def _receive(self, number: int, frame: Any) -> None:
        first, self.number = self.number is None, self.number or number
        if not self.apart:
            raise KeyboardInterrupt
        if first:
            self._tell(number)
        if self._process:
            self._hand_on(number)

    def _hand_on(self, number: int) -> None:
        assert self._process is not None
        # Ctrl-C reaches all processes of a terminal's command, so it reaches all of a run's here.
        send = os.killpg if number == signal.SIGINT else os.kill
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            send(self._process.pid, number)


def run_apart(
    settings: Settings,
    log: Path,
    stop: SweepSignals,
    lock: int | None = None,
    is_hopeless: Callable[[], bool] | None = None,
) -> Outcome:
    """Train by `msplora train --resume auto` in a process of its own; start anew what cannot go on.

    It inherits `lock`: should this process be killed, the sweep is not free until that one has
    ended too. It holds its log as well: where there is no `lock`, one that was left is waited for.
    Where `is_hopeless` says so, asked while it trains, it is stopped and rejected. Where somebody
    or the system ended its process it is unfinished: that says nothing of the run.
    """
    config = log.with_suffix(".yaml")
    write_settings(settings, config)
    how = ["--force"] if has_to_start_anew(settings) else ["--resume", "auto"]
    command = [sys.executable, "-m", "msplora", "train", str(config), *how]
    began, before = time.monotonic(), log.stat().st_size if log.exists() else 0
    with log.open("ab") as file:
        _wait_until_free(file)
        stop.apart = True
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # signals reach it by way of `stop` only
            pass_fds=() if lock is None else (lock,),
        )
        stop.follow(process)
        try:
            status, usage, rejected = _wait_for(process, is_hopeless)
        except BaseException:  # as where a cluster takes the task back
            process.terminate()
            process.wait()
            raise
        finally:
            stop.forget()
    process.returncode = code = os.waitstatus_to_exitcode(status)
    config.unlink()
    seconds = time.monotonic() - began
    resident = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if code == 0:
        return Outcome("complete", seconds, resident_bytes=resident)
    with log.open("rb") as file:
        file.seek(before)
        said = _error_in(file.read().decode("utf-8", "replace"))
    if stop.asked:
        return Outcome("unfinished", seconds, said, resident)
    if rejected:
        return Outcome("rejected", seconds, None, resident)
    if code < 0:
        said = f"its process was ended by {signal.Signals(-code).name}"
        said += ", as for want of memory" if code == -signal.SIGKILL else ""
    if code == _DIVERGED:
        return Outcome("diverged", seconds, said, resident)
    # One that saved a checkpoint before it went says so by 128 plus the signal.
    if -code in _FROM_OUTSIDE or code - 128 in _FROM_OUTSIDE:
        return Outcome("unfinished", seconds, goes_on_later(said), resident)
    return Outcome("failed", seconds, said, resident)


def goes_on_later(why: str) -> str:
    """What is said of a run that is not to blame for its end."""
    return f"{why.rstrip('.')}. The next start goes on with it."


def _wait_until_free(file: IO[bytes]) -> None:
    """Hold a file, once no process does any more."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_BETWEEN_LOOKS)
        except OSError:
            return  # some network file systems have no locks
        else:
            return


def _wait_for(
    process: subprocess.Popen[bytes], is_hopeless: Callable[[], bool] | None
) -> tuple[int, Any, bool]:
    """Its exit status, what it used, and whether it was stopped as hopeless."""
    rejected = False
    while True:  # not one long wait, which what a cluster does to take a task back cannot end
        found, status, usage = os.wait4(process.pid, os.WNOHANG)
        if found:
            return status, usage, rejected
        if is_hopeless and not rejected and is_hopeless():
            process.terminate()
            rejected = True
        time.sleep(_BETWEEN_LOOKS)


def run_here(settings: Settings, log: Path, stop: SweepSignals) -> Outcome:
    """Train in this process."""
    from rich.console import Console

    from msplora.train.progress import TrainingDiverged
    from msplora.train.run import train_run

    began = time.monotonic()

    def outcome(status: Any, error: str | None = None) -> Outcome:
        return Outcome(status, time.monotonic() - began, error)

    with log.open("a", encoding="utf-8") as file:
        console = Console(file=file, width=120)
        try:
            anew = has_to_start_anew(settings)
            train_run(settings, resume=False if anew else "auto", force=anew, console=console)
        except Interrupted as error:
            stop.number = stop.number or error.exit_code - 128
            return outcome("unfinished", str(error))
        except TrainingDiverged as error:
            return outcome("diverged", str(error))
        except MSPLoraError as error:
            return outcome("failed", str(error))
        except Exception as error:
            # Whatever it is, such as want of memory, it is this run's: the others are to go on.
            traceback.print_exc(file=file)
            return outcome("failed", _error_in(f"{type(error).__name__}: {error}"))
        finally:
            _free_memory()
    return outcome("complete")


def _free_memory() -> None:
    """What a trainer leaves refers to itself, and would stay on the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _error_in(said: str) -> str:
    """Our own error at the end of what a run printed, else the last line of a traceback."""
    lines = [line for line in said.splitlines() if line.strip()]
    for place in reversed(range(len(lines))):
        if lines[place].startswith(("Error: ", "Stopped: ")):
            return "\n".join(lines[place:]).partition(": ")[2]
    return lines[-1].strip() if lines else "it said nothing"
