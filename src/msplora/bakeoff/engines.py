"""Where the runs of a bake-off are made: here, one after the other, or on Ray's machines."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from msplora.errors import MSPLoraError
from msplora.extras import how_to_install
from msplora.sweep.rows import Row
from msplora.sweep.running import SweepSignals, goes_on_later

from .begun_on import note_origin
from .choosing import Chain, Rivals
from .reading import Run
from .running import Job, make_run

MakeJob = Callable[[Run, Rivals | None], Job | Row]
"""Gives what is to be done for a run, or its row where nothing is."""


class Book(Protocol):
    """Who keeps the rows."""

    def job(self, run: Run, rivals: Rivals | None) -> Job | Row:
        """What is to be done for a run, or its row where nothing is."""
        ...

    def started(self, job: Job) -> None:
        """A run begins, on what its row says."""
        ...

    def ended(self, row: Row) -> None:
        """A run has ended, however it did."""
        ...


class Engine(Protocol):
    """Makes the runs of chains; those of one chain one after the other."""

    def work_off(self, chains: Iterable[Chain], book: Book, stop: SweepSignals) -> None:
        """Make all runs, or those until a stop is asked for."""
        ...


def _next(chain: Chain, book: Book, row: Row | None) -> Job | None:
    """The next job of a chain, past all that is done already; None at its end."""
    try:
        wanted = chain.send(row) if row else next(chain)
        while isinstance(found := book.job(*wanted), Row):
            wanted = chain.send(found)
        return found
    except StopIteration:
        return None


@dataclass(frozen=True)
class Here:
    """One run at a time, in a process of its own on this machine."""

    lock: int | None = None

    def work_off(self, chains: Iterable[Chain], book: Book, stop: SweepSignals) -> None:
        """Make all runs, or those until a stop is asked for."""
        for chain in chains:
            job = _next(chain, book, None)
            while job is not None:
                note_origin(job.row, job.settings)
                book.started(job)
                row = make_run(job, stop, self.lock)
                book.ended(row)
                if stop.asked:
                    return
                job = _next(chain, book, row)


@dataclass(frozen=True)
class OnRay:
    """As many runs at once as Ray has room for, on one machine or on a cluster.

    The folder of the bake-off, the model and the data must be at the same path on all machines.
    """

    address: str
    """Of a running cluster, or "local" for one that is started here."""
    cpus: float
    """Cores that a run takes."""
    gpus: float
    """GPUs that a run takes; a share lets several runs share one."""

    def work_off(self, chains: Iterable[Chain], book: Book, stop: SweepSignals) -> None:
        """Make all runs, or those until a stop is asked for."""
        ray = self._connect()
        remote = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(_make_run_there)
        at_work: dict[Any, tuple[Chain, Job]] = {}

        def send(chain: Chain, row: Row | None) -> None:
            job = None if stop.asked else _next(chain, book, row)
            if job is not None:  # it has no row until it ends: Ray says not when it begins
                at_work[remote.remote(job, max(1, int(self.cpus)), self.gpus)] = chain, job

        try:
            for chain in chains:
                send(chain, None)
            while at_work:
                ready, _ = ray.wait(list(at_work), num_returns=1)
                chain, job = at_work.pop(ready[0])
                try:
                    row = ray.get(ready[0])
                except ray.exceptions.RayTaskError as error:
                    row = job.row
                    row.status, row.error = "failed", _last_line(error)
                except ray.exceptions.RayError as error:  # the machine is gone, or the task was
                    row = job.row
                    row.status, row.error = "unfinished", goes_on_later(_last_line(error))
                book.ended(row)
                send(chain, row)
        except KeyboardInterrupt:
            for task in at_work:
                ray.cancel(task)  # its process saves a checkpoint, which the next start finds
            if at_work:
                ray.wait(list(at_work), num_returns=len(at_work), timeout=60)
            raise

    def _connect(self) -> Any:
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError:
            raise MSPLoraError(
                f"--ray needs ray, which is not installed: {how_to_install('ray')}"
            ) from None
        if ray.is_initialized():
            return ray
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            # "local" is Ray's own word for one that is started here, whatever runs already.
            ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
            signal.signal(signal.SIGTERM, on_sigterm)  # it has put one of its own there
        except (ConnectionError, ValueError) as error:
            raise MSPLoraError(
                f"--ray {self.address}: {error}. Start a cluster with `ray start`, or use --ray "
                f"local."
            ) from None
        machines = [its["Resources"] for its in ray.nodes() if its["Alive"]]
        for kind, wanted in (("CPU", self.cpus), ("GPU", self.gpus)):
            most = max((its.get(kind, 0) for its in machines), default=0)
            if wanted > most:  # a run is on one machine, whatever they have together
                raise MSPLoraError(
                    f"a run is to have {wanted:g} {kind}, and no machine of Ray's has more than "
                    f"{most:g}: it would wait for ever. Ask for less with --{kind.lower()}s."
                )
        return ray


def _make_run_there(job: Job, threads: int, gpus: float) -> Row:
    """Make a run in a worker of Ray's, which has set CUDA_VISIBLE_DEVICES for a share above 0."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if not gpus:  # a newer Ray leaves a task that asked for none all that there are
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    note_origin(job.row, job.settings)
    return make_run(job, SweepSignals())


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
