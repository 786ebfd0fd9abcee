"""Ctrl-C and SIGTERM while a run trains: it stops at the next step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from msplora.errors import MSPLoraError

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}

BEFORE_THE_FIRST_STEP = "stopping before the first step"
AFTER_THIS_EVALUATION = "stopping after this evaluation"
AFTER_THIS_STEP = "stopping after this step"
IS_BEING_FINISHED = "the last step is made, so the run is being finished"


def name_of(number: int) -> str:
    """A signal as its sender knows it."""
    number = signal.Signals(number)
    return _NAMES.get(number, number.name)


class Interrupted(MSPLoraError):
    """The run was stopped; it can be resumed. The exit code is 128 plus the signal's number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Stopped(Exception):
    """Raised out of the training loop once what a stop calls for has been saved."""


class StopSignals:
    """Within the block, a signal asks for a stop (`asked`) instead of making one.

    What that leads to is said to the terminal, where it `tells`. A second Ctrl-C raises
    KeyboardInterrupt. Outside the main thread, and for a signal that the process ignores (as under
    nohup), nothing is changed.
    """

    def __init__(self, tells: bool = True) -> None:
        self.number: int | None = None
        self._tells = tells
        self.what_follows: Callable[[], str] = lambda: BEFORE_THE_FIRST_STEP
        """Asked when the signal comes, for what is said then: one of the sentences above."""
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    @property
    def name(self) -> str:
        """What stopped the run, in words; another process's signal may have."""
        return name_of(self.number or signal.SIGTERM)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _NAMES:
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):
                    self._before[number] = before
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def _receive(self, number: int, _: Any) -> None:
        if self.number is None:
            self.number = number
            self._tell(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def _tell(self, number: int) -> None:
        if not self._tells:
            return  # of several processes one does
        said = f"{name_of(number)}: {self.what_follows()}."
        again = "Ctrl-C again" if number == signal.SIGINT else "Ctrl-C"
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{said} {again} stops at once, and loses what is not saved yet.\n".encode())
