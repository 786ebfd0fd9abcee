"""Ctrl-C and SIGTERM while several processes train: each gets the signal, and ends as one would."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import Any

from torch.distributed.elastic.multiprocessing import PContext

_PASSED_ON = (signal.SIGINT, signal.SIGTERM)


class PassesOn:
    """Within the block, what torch's launcher starts is told of a signal, and then waited for.

    By itself the launcher would raise an error, and kill after 30 seconds what still evaluates.
    (Only some versions of torch can be told to wait longer.) Here it goes on watching:
    the processes save and end with the signal's exit code, or complete the run. A second Ctrl-C
    stops them at once; a third kills them, wherever they hang.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The first signal that came."""
        self._stops_at_once = False
        self._workers: PContext | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> PassesOn:
        self._start = start = PContext.start
        self._before = {its: signal.getsignal(its) for its in (*_PASSED_ON, signal.SIGHUP)}

        def start_and_listen(workers: PContext) -> None:
            start(workers)  # which sets handlers of its own
            self._workers = workers
            self._listen()

        PContext.start = start_and_listen
        return self

    def __exit__(self, *_: object) -> None:
        PContext.start = self._start
        for number, before in self._before.items():
            signal.signal(number, before)

    def _listen(self) -> None:
        for number, before in self._before.items():
            if before == signal.SIG_IGN:  # as SIGHUP is under nohup
                signal.signal(number, signal.SIG_IGN)
            elif number in _PASSED_ON:
                signal.signal(number, self._receive)

    def _receive(self, number: int, _: Any) -> None:
        if self.number is None:
            self.number = number
        elif number == signal.SIGINT:
            number = signal.SIGKILL if self._stops_at_once else number
            self._stops_at_once = True
        assert self._workers
        for process in self._workers.pids().values():
            with suppress(ProcessLookupError):  # one may have ended
                os.kill(process, number)
