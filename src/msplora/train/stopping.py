"""Ctrl-C and SIGTERM while a run trains: it stops at the next step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from msplora.errors import MSPLoraError

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupted(MSPLoraError):
    """The run was stopped; it can be resumed. The exit code is 128 plus the signal's number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Stopped(Exception):
    """Raised out of the training loop once what a stop calls for has been saved."""


class StopSignals:
    """Within the block, a signal asks for a stop (`asked`) instead of making one.

    A second Ctrl-C raises KeyboardInterrupt. Outside the main thread, and for a signal that the
    process ignores (as under nohup), nothing is changed.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    @property
    def name(self) -> str:
        """What stopped the run, in words; another process's signal may have."""
        return _NAMES[signal.Signals(self.number or signal.SIGTERM)]

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
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{_NAMES[signal.Signals(number)]}: {_STOPPING}\n".encode())


_STOPPING = "stopping after this step. Ctrl-C stops at once, and loses what is not saved yet."
