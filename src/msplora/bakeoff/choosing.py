"""The learning rate of each entrant: which are tried, in which order, and which is the best."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from statistics import mean

from msplora.sweep.rows import Row
from msplora.train.metric_order import sign_of

from .folder import BakeOffFolder
from .reading import BakeOff, Run, rounded

Rivals = list[Row]
Chain = Generator[tuple[Run, Rivals | None], Row, None]
"""Runs that follow one another: yields a run, and the rows of the rates tried before it (None where
it is not to be rejected), and is sent the run's row."""


@dataclass(frozen=True)
class Tried:
    """A learning rate of an entrant, with its runs on what rates are chosen on."""

    rate: float
    rows: Sequence[Row]

    @property
    def is_settled(self) -> bool:
        """Whether something came of every run, be it that it failed."""
        return all(row.status != "unfinished" for row in self.rows)

    @property
    def is_whole(self) -> bool:
        """Whether every run came to its end."""
        return all(row.status == "complete" for row in self.rows)

    @property
    def score(self) -> float | None:
        """The mean of the metric over tasks and seeds, turned so that more is better."""
        if not self.is_whole:
            return None
        return mean(sign_of(row.metric) * (row.value or 0.0) for row in self.rows)


@dataclass(frozen=True)
class Choice:
    """What was tried of an entrant, in rising order, and the best of it."""

    tried: Sequence[Tried]
    best: Tried | None
    """None where no rate came to its end on all that it is chosen on."""
    beyond: float | None
    """The rate to try next, or to finish, where the best one is at an end of what was tried."""
    reached: Sequence[float] = ()
    """The rates of `tried` beyond those that the file gives, in the order of their trial."""
    begun: Sequence[Tried] = ()
    """Further rates to be tried, of which only some runs have rows, or are not finished."""
    is_settled: bool = True
    """Whether something came of every run that rates are chosen by, be it that it failed."""

    @property
    def given_up(self) -> list[Row]:
        """The rejected runs of rates of which no run failed or diverged."""
        ended = ("complete", "rejected")
        rates = [its for its in self.tried if all(row.status in ended for row in its.rows)]
        return [row for its in rates for row in its.rows if row.status == "rejected"]


def ladder(entrant: str, task: str, seed: int, rates: Sequence[float], rivals: Rivals) -> Chain:
    """The rates of an entrant on one task with one seed, each judged by those before it."""
    tried = list(rivals)
    for rate in rates:
        row = yield Run(entrant, task, rate, seed), list(tried)
        if row.status in ("complete", "rejected"):
            tried.append(row)


def single(run: Run) -> Chain:
    """A run that counts, and is not rejected."""
    yield run, None


def choose(bake_off: BakeOff, folder: BakeOffFolder, entrant: str) -> Choice:
    """The best rate of an entrant: of those that the file gives, and of those beyond them that were
    tried because the best one was at an end. Other rates, of an earlier file, do not count.
    """
    wanted = [(task, seed) for task in bake_off.choose_tasks for seed in bake_off.choose_seeds]
    rows: dict[float, list[Row]] = {}
    for row in folder.rows:
        its = row.parameters
        if its["method"] == entrant and (its["task"], its["seed"]) in wanted:
            rows.setdefault(its["learning_rate"], []).append(row)
    whole = {rate: Tried(rate, its) for rate, its in rows.items() if len(its) == len(wanted)}
    settled = {rate: its for rate, its in whole.items() if its.is_settled}
    given = sorted(bake_off.entrants[entrant].rates)
    tried = [whole[rate] for rate in given if rate in whole]
    best, beyond = _best(tried), None
    reached: list[float] = []
    have_all = settled.keys() >= set(given)
    if have_all:
        for _ in range(bake_off.settings.choose.extend):
            beyond = next_out(given, [its.rate for its in tried], best.rate) if best else None
            if beyond not in settled:
                break
            reached.append(beyond)
            tried = sorted([*tried, settled[beyond]], key=lambda its: its.rate)
            best, beyond = _best(tried), None
    to_try = given if beyond is None else [*given, beyond]
    begun = [
        Tried(rate, rows[rate])
        for rate in to_try
        if rate in rows and all(its.rate != rate for its in tried)
    ]
    return Choice(tried, best, beyond, reached, begun, have_all and beyond is None)


def _best(tried: Sequence[Tried]) -> Tried | None:
    whole = [its for its in tried if its.is_whole]
    # Of two alike the lower, which is the safer one.
    return max(whole, key=lambda its: (its.score, -its.rate), default=None)


def next_out(given: Sequence[float], tried: Sequence[float], best: float) -> float | None:
    """The next rate out, in the steps of the rates that were given; None where there is no need.

    Args:
        given: in rising order.
        tried: all that were, in rising order.
        best: of these.
    """
    if len(given) < 2:
        return None
    if best == tried[-1]:
        return rounded(best * given[-1] / given[-2])
    if best == tried[0]:
        return rounded(best * given[0] / given[1])
    return None
