"""A sweep from its file to its table and plot; what is there already is not run again."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

from rich.console import Console

from msplora.errors import MSPLoraError
from msplora.train.inputs import data_paths, fingerprint
from msplora.train.interrupted import goes_on
from msplora.train.settings import Settings
from msplora.train.stopping import Interrupted

from .best import best_by_method
from .folder import SWEEP, SweepFolder, SweepFolderError
from .naming import run_name
from .reading import Sweep
from .rows import Row, Rows
from .running import Outcome, SweepSignals, run_apart, run_here
from .settings_tried import Setting, settings_so_far, settings_to_run
from .table import write_tables

MANY = 1000


class TooMany(MSPLoraError):
    """More runs than anybody asks for on purpose."""


def run_sweep(
    sweep: Sweep,
    console: Console | None = None,
    *,
    retry_failed: bool = False,
    allow_many: bool = False,
) -> list[Setting]:
    """Run what is left of a sweep; return all of its settings.

    A run that diverges or fails is recorded, and the others go on. Failed ones are run again only
    with `retry_failed`.

    Raises:
        TooMany: more than a thousand runs, without `allow_many`.
        SweepFolderError: the output is taken, holds runs of another base config, or the disk is
            full.
        Interrupted: Ctrl-C or SIGTERM. The run was saved, and the message says how to go on.
    """
    return _Running(sweep, console or Console(), retry_failed, allow_many).run()


class _Running:
    def __init__(
        self, sweep: Sweep, console: Console, retry_failed: bool, allow_many: bool
    ) -> None:
        if sweep.count > MANY and not allow_many:
            raise TooMany(
                f"in {sweep.source}: the sweep has {sweep.count:,} runs. Give fewer values, search "
                f"instead of a grid, or pass --allow-many."
            )
        self.sweep, self.console, self.retry_failed = sweep, console, retry_failed
        self.folder = SweepFolder(sweep)
        self.stop = SweepSignals()
        self._inputs: dict[str, dict[str, int]] = {}
        """What is read by which `data` and `init_from`, since the sweep was taken up."""

    def run(self) -> list[Setting]:
        folder, stop = self.folder, self.stop
        folder.begin()
        try:
            self.rows = Rows(folder.path)
            self._check_same_inputs()
            try:
                with stop:
                    self._run_all()
            except KeyboardInterrupt:
                stop.number = stop.number or signal.SIGINT
            except OSError as error:
                raise SweepFolderError(
                    f"the sweep in {folder.path} cannot go on: {error}. What was made is kept: "
                    f"once that is mended, give the same command again."
                ) from error
            settings = settings_so_far(self.sweep, self.rows)
            self._write(settings)
        finally:
            folder.release()
        if stop.asked:
            done = sum(row is not None for its in settings for row in its.rows.values())
            raise Interrupted(
                f"the sweep was stopped by {stop.name}, with {done} of {self.sweep.count} runs "
                f"begun. To go on: msplora sweep {shlex.quote(str(folder.path / SWEEP))}",
                stop.number or signal.SIGTERM,
            )
        return settings

    def _run_all(self) -> None:
        place = 0
        for setting in settings_to_run(self.sweep, self.rows):
            for seed, row in setting.rows.items():
                place += 1
                if row is None or row.status == "unfinished" or self._is_retried(row):
                    self._run(setting, seed, row, place)
                    if self.stop.asked:
                        return
            if self.sweep.settings.keep == "best":
                self._keep_the_best()

    def _check_same_inputs(self) -> None:
        """Refuse to add to results of other data: all stand in one table."""
        old = 0
        for setting in settings_so_far(self.sweep, self.rows):
            for seed, row in setting.rows.items():
                if row is None or row.status == "failed":  # it may have failed for what it read
                    continue
                settings = self.sweep.settings_of(setting.parameters, seed)
                settings.output = str(self.folder.run(row.name))
                if row.status != "unfinished":
                    old += row.inputs is None
                elif not goes_on(settings):  # nothing is made of the data yet
                    continue
                self._check_inputs(row, settings)
        if old:
            self._say(f"{old} runs are of an older msplora, which kept no checksum of their data.")

    def _check_inputs(self, row: Row, settings: Settings) -> None:
        """Compare what a run read, or is about to read, with what is there since the start."""
        which = repr((settings.data, settings.init_from))
        if which not in self._inputs:
            self._inputs[which] = fingerprint(settings)
        there = self._inputs[which]
        changed = [what for what, its in (row.inputs or {}).items() if there.get(what) != its]
        if changed:
            named = {"data": ", ".join(data_paths(settings)), "init_from": settings.init_from}
            raise SweepFolderError(
                f"the sweep in {self.folder.path} has runs that were made with other content of "
                f"{'; '.join(f'{named[what]} ({what})' for what in changed)}. They cannot be "
                f"compared with new ones: put the old content back, or name another output."
            )

    def _is_retried(self, row: Row) -> bool:
        return row.status == "failed" and self.retry_failed

    def _run(self, setting: Setting, seed: int | None, row: Row | None, place: int) -> None:
        settings = self.sweep.settings_of(setting.parameters, seed)
        if row is None:
            name = run_name(setting.parameters, seed, self.rows)
            row = Row.started(name, setting.parameters, seed, settings)
        inputs = fingerprint(settings)
        if row.status == "failed" and row.inputs != inputs:
            self.folder.remove_unfinished(row.name)  # it could not go on with other data
        row.status, row.inputs = "unfinished", inputs
        self._check_inputs(row, settings)
        self.rows.put(row)  # before it starts: what a search chose is known after a kill too
        settings.output = str(self.folder.run(row.name))
        log = self.folder.log(row.name)
        self._say(f"[{place}/{self.sweep.count}] {row.name}")
        with self.console.status(f"training; what it says is in {log}"):
            if self.sweep.settings.isolate:
                outcome = run_apart(settings, log, self.stop, self.folder.lock)
            else:
                outcome = run_here(settings, log, self.stop)
        self._record(row, outcome)
        self._say(f"    {_told(row)}")

    def _record(self, row: Row, outcome: Outcome) -> None:
        row.status, row.error = outcome.status, outcome.error
        row.seconds += outcome.seconds
        row.resident_bytes = max(row.resident_bytes or 0, outcome.resident_bytes or 0) or None
        if outcome.status == "complete":
            row.read_run(self.folder.run(row.name))
        elif outcome.status == "diverged":
            self.folder.remove_unfinished(row.name)
        self.rows.put(row)

    def _keep_the_best(self) -> None:
        settings = settings_so_far(self.sweep, self.rows)
        best = best_by_method(settings)
        for setting in settings:
            # One that lacks a run may be the best when it is made, and wants all its runs then.
            if setting in best or any(
                row is None or row.status in ("unfinished", "failed")
                for row in setting.rows.values()
            ):
                continue
            for row in setting.complete:
                if row.kept:
                    row.kept = False
                    self.rows.put(row)
                    self.folder.remove_run(row.name)

    def _write(self, settings: list[Setting]) -> None:
        from .plot import draw_sweep  # matplotlib takes a second to import

        write_tables(self.sweep, settings, self.folder.path)
        draw_sweep(self.sweep, settings, self.folder.path / "sweep.png")

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def results_in(sweep: Sweep) -> tuple[list[Setting], Path]:
    """The settings of a sweep as far as they were run, and its folder; nothing is written."""
    folder = SweepFolder(sweep)
    return settings_so_far(sweep, Rows(folder.path)), folder.path


def _told(row: Row) -> str:
    if row.status == "complete":
        return f"{row.metric} {row.value:.4f} ({row.seconds:.0f} s)"
    return f"{row.status}: {row.error}"
