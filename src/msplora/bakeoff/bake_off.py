"""A bake-off from its file to its report; what is there already is not run again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console

from msplora.sweep.folder import LOGS, SweepFolderError
from msplora.sweep.rows import Row, essence
from msplora.sweep.running import SweepSignals
from msplora.train.absolute_paths import with_absolute_paths
from msplora.train.stopping import Interrupted

from .choosing import Chain, Choice, Rivals, choose, ladder, single
from .engines import Engine, Here
from .folder import BakeOffFolder, portable
from .reading import Run
from .rejecting import Rejecting
from .running import Job
from .sizes import Prepared
from .verdicts import verdicts


@dataclass(frozen=True)
class Outcome:
    """A bake-off as far as it has been run."""

    prepared: Prepared
    choices: dict[str, Choice]
    """Entrant -> its learning rates."""
    finals: dict[Run, Row | None]
    """The runs that count, in the order of tasks, entrants, seeds; None of one not begun."""
    rows: tuple[Row, ...]
    """All runs."""

    @property
    def used(self) -> tuple[Row, ...]:
        """The rows of the runs that count, and of those that rates are chosen by. The others are
        of another file, or of a rate that was once the best.
        """
        rates = [its for choice in self.choices.values() for its in (*choice.tried, *choice.begun)]
        names = {row.name for its in rates for row in its.rows} | {run.name for run in self.finals}
        return tuple(row for row in self.rows if row.name in names)

    @property
    def is_over(self) -> bool:
        """Whether no run is left to be made but those that failed."""
        for choice in self.choices.values():
            if not choice.is_settled or (choice.best is None and choice.given_up):
                return False
        # What a rule gave up that was changed since is made, too.
        for row, hopeless in verdicts(self.prepared, self.choices):
            if row.status == "rejected" and not hopeless:
                return False
        return all(row and row.status != "unfinished" for row in self.finals.values())


def run_bake_off(
    prepared: Prepared,
    console: Console | None = None,
    engine: Engine | None = None,
    *,
    retry_failed: bool = False,
) -> Outcome:
    """Run what is left of a bake-off: first the rates to choose from, then the runs that count.

    A run that fails is recorded, and the others go on. Failed ones are run again only with
    `retry_failed`.

    Raises:
        SweepFolderError: the output is taken, holds another bake-off, or the disk is full.
        Interrupted: Ctrl-C or SIGTERM. Runs were saved, and the message says how to go on.
    """
    return _Running(prepared, console or Console(), engine, retry_failed).run()


def outcome_so_far(prepared: Prepared) -> Outcome:
    """What has been run until now; nothing is written."""
    return _outcome(prepared, BakeOffFolder(prepared.bake_off))


def _outcome(prepared: Prepared, folder: BakeOffFolder) -> Outcome:
    choices = {name: choose(folder.bake_off, folder, name) for name in folder.bake_off.entrants}
    finals = {run: folder.rows.get(run.name) for run in _finals(folder, choices)}
    tasks, entrants = list(folder.bake_off.settings.tasks), list(folder.bake_off.entrants)

    def place(run: Run) -> tuple[int, int, int]:
        return tasks.index(run.task), entrants.index(run.entrant), run.seed

    in_order = {run: finals[run] for run in sorted(finals, key=place)}
    return Outcome(prepared, choices, in_order, tuple(folder.rows))


def _finals(folder: BakeOffFolder, choices: dict[str, Choice]) -> Iterator[Run]:
    """The runs that count, seed by seed: one that is stopped has compared all it could."""
    settings = folder.bake_off.settings
    for seed in settings.seeds:
        for task in settings.tasks:
            for name, choice in choices.items():
                if choice.best is not None:
                    yield Run(name, task, choice.best.rate, seed)


class _Running:
    """Runs a bake-off, and keeps its rows (the `Book` of its engine)."""

    def __init__(
        self, prepared: Prepared, console: Console, engine: Engine | None, retry_failed: bool
    ) -> None:
        self.prepared, self.bake_off = prepared, prepared.bake_off
        self.console, self.engine, self.retry_failed = console, engine, retry_failed
        self.folder = BakeOffFolder(self.bake_off)
        self.stop = SweepSignals()
        self.looked_at: set[tuple[str, float]] = set()
        """Entrants with rates beyond those given that this start has seen to."""

    def run(self) -> Outcome:
        folder, stop = self.folder, self.stop
        folder.begin()
        try:
            try:
                with stop:
                    self._run_all(self.engine or Here(folder.lock))
            except KeyboardInterrupt:
                stop.number = stop.number or signal.SIGINT
            except OSError as error:
                raise SweepFolderError(
                    f"the bake-off in {folder.path} cannot go on: {error}. What was made is kept: "
                    f"once there is room, give the same command again."
                ) from error
            outcome = _outcome(self.prepared, folder)
        finally:
            folder.release()
        if stop.asked:
            raise Interrupted(
                f"the bake-off in {folder.path} was stopped by {stop.name}. To go on, give the "
                f"same command again.",
                stop.number or signal.SIGTERM,
            )
        return outcome

    def _run_all(self, engine: Engine) -> None:
        bake_off, folder = self.bake_off, self.folder
        engine.work_off(
            [
                ladder(name, task, seed, bake_off.entrants[name].rates, [])
                for task in bake_off.choose_tasks
                for seed in bake_off.choose_seeds
                for name in bake_off.entrants
            ],
            self,
            self.stop,
        )
        while not self.stop.asked and (chains := list(self._also())):
            engine.work_off(chains, self, self.stop)
        if not self.stop.asked:
            choices = {name: choose(bake_off, folder, name) for name in bake_off.entrants}
            for name, choice in choices.items():
                if not choice.is_settled:
                    self._say(
                        f"{name}: not all of its learning rates came to an end, so it is not run "
                        f"with the best of the others yet. Give the same command again."
                    )
            decided = {name: its for name, its in choices.items() if its.is_settled}
            engine.work_off([single(its) for its in _finals(folder, decided)], self, self.stop)

    def _also(self) -> Iterator[Chain]:
        """Beyond the rates that were given, where an entrant's best was at an end: the next rate
        out, and before it those that an earlier start reached. Each is looked at once per start: it
        may have been stopped, have failed, or have been given up under another rule. Where no rate
        of an entrant came to its end everywhere: those that were given up only, to their ends.
        """
        bake_off = self.bake_off
        for name, entrant in bake_off.entrants.items():
            choice = choose(bake_off, self.folder, name)
            if choice.best is None:
                yield from (single(Run.of(row.parameters)) for row in choice.given_up)
            further = [*choice.reached, *([choice.beyond] if choice.beyond is not None else [])]
            rate = next((its for its in further if (name, its) not in self.looked_at), None)
            if rate is None:
                continue
            self.looked_at.add((name, rate))
            before = {*entrant.rates, *further[: further.index(rate)]}
            for task in bake_off.choose_tasks:
                for seed in bake_off.choose_seeds:
                    rivals = [
                        row
                        for its in choice.tried
                        if its.rate in before
                        for row in its.rows
                        if (row.parameters["task"], row.seed) == (task, seed)
                        and row.status in ("complete", "rejected")
                    ]
                    yield ladder(name, task, seed, [rate], rivals)

    def job(self, run: Run, rivals: Rivals | None) -> Job | Row:
        row, rejecting = self.folder.row(run), self._rejecting(run, rivals)
        over = {"complete", "diverged"} if self.retry_failed else {"complete", "diverged", "failed"}
        # A rule that was changed may let it live; and one that counts is run to its end.
        if row.status == "rejected" and rejecting:
            if rejecting.until_hopeless(row.evaluations, row.steps or 0):
                return row
        elif row.status in over:
            return row
        settings = self.bake_off.settings_of(run)
        row.config, row.files = portable(essence(settings)), self.folder.inputs(run)
        log = self.folder.path / LOGS / f"{run.name}.log"
        return Job(row, with_absolute_paths(settings), log, rejecting)

    def _rejecting(self, run: Run, rivals: Rivals | None) -> Rejecting | None:
        reject = self.bake_off.settings.reject
        if reject is None or rivals is None:
            return None
        metric = self.prepared.metrics[run.task]
        return Rejecting(reject, metric, [its.evaluations for its in rivals])

    def started(self, job: Job) -> None:
        job.row.status, job.row.error = "unfinished", None
        self.folder.rows.put(job.row)
        self._say(job.row.name)

    def ended(self, row: Row) -> None:
        told = _told(row)
        if row.status == "unfinished":
            row.error = None  # told, it is over; and it may name a folder of this machine
        self.folder.rows.put(row)
        self._say(f"    {row.name}: {told}")

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _told(row: Row) -> str:
    if row.status == "complete":
        return f"{row.metric} {row.value:.4f} ({row.seconds:.0f} s)"
    if row.status == "rejected":
        return f"rejected after {row.evaluations[-1]['epoch']:g} epochs ({row.seconds:.0f} s)"
    return f"{row.status}: {row.error}"
