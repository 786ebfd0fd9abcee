"""What the runs that count say: means, spreads, paired differences, and who is beaten by nobody."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import mean, stdev

import numpy as np

from msplora.sweep.rows import Row
from msplora.train.metric_order import sign_of

from .bake_off import Outcome

_EXACT = 16
"""Up to so many pairs, all ways to flip their signs are counted; of more, 2^16 are drawn."""
Values = Mapping[tuple[str, str, int], float]
"""Entrant, task and seed -> the metric of the checkpoint that was kept."""


@dataclass(frozen=True)
class Spread:
    """Values of several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return mean(self.values)

    @property
    def deviation(self) -> float | None:
        """Their standard deviation (n - 1); None of a single one."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Paired:
    """An entrant against another one, on the same tasks with the same seeds."""

    differences: tuple[float, ...]
    """By task and seed, turned so that above 0 the entrant is better."""
    by_task: Mapping[str, float]
    """Task -> mean difference."""
    p: float
    """Of a two-sided sign-flip test: the share of flips whose mean is as far from 0."""
    adjusted: float = 1.0
    """`p` after Holm, for all entrants that are to be compared."""

    @property
    def mean(self) -> float:
        """The mean difference: over the seeds of each task, then over the tasks."""
        return mean(self.by_task.values())


@dataclass(frozen=True)
class Standing:
    """How an entrant came out."""

    name: str
    size: int
    """Numbers that its adapter trains."""
    rate: float | None
    """The learning rate that was chosen."""
    tasks: Mapping[str, Spread]
    """Of each task with at least one seed."""
    overall: Spread | None
    """By seed, the mean over the tasks, of the seeds that have them all."""
    against: Paired | None
    """Against the baseline; None of itself, and where they have no pair on some task."""
    on_front: bool
    """Whether no entrant of this size or smaller is as good or better, of those that lack no run;
    False of one that does."""
    seconds: float | None
    """The mean time of training and the evaluations in it: over each task's runs that were made in
    one go on the commonest hardware, then over the tasks; None where a task has no such run."""
    all_timed: bool
    """Whether all complete runs are of that kind."""
    memory: int | None
    """The most that a run took: of the GPU where there is one, else of its process."""
    missing: Mapping[str, int]
    """What became of the runs that should count and do not: status -> runs."""


def standings(outcome: Outcome) -> list[Standing]:
    """All entrants, the best first; those that lack runs after them, for what they lack may be what
    is hard: first those with the most whole seeds.
    """
    bake_off, sizes = outcome.prepared.bake_off, outcome.prepared.sizes
    sign, values = sign_of_all(outcome), values_of(outcome)
    seeds, all_tasks = bake_off.settings.seeds, list(bake_off.settings.tasks)
    overall = {
        name: [
            mean(values[name, task, seed] for task in all_tasks)
            for seed in seeds
            if all((name, task, seed) in values for task in all_tasks)
        ]
        for name in bake_off.entrants
    }
    scores = {name: sign * mean(its) for name, its in overall.items() if its}
    runs = {
        name: {run: row for run, row in outcome.finals.items() if run.entrant == name}
        for name in bake_off.entrants
    }
    wanted = len(seeds) * len(all_tasks)
    missing = {name: _missing(its.values(), wanted) for name, its in runs.items()}
    comparable = {name: its for name, its in scores.items() if not missing[name]}
    pairs = holm(
        {
            name: found
            for name in bake_off.entrants
            if name != bake_off.baseline
            and (found := pair(name, bake_off.baseline, values, all_tasks, sign))
        },
        len(bake_off.entrants) - 1,
    )
    hardware = commonest_hardware(outcome)
    found = []
    for name in bake_off.entrants:
        best = outcome.choices[name].best
        complete = {run: its for run, its in runs[name].items() if its and its.status == "complete"}
        tasks = {
            task: Spread(its)
            for task in all_tasks
            if (its := tuple(values[name, task, s] for s in seeds if (name, task, s) in values))
        }
        timed = {
            run: row.train_seconds
            for run, row in complete.items()
            if row.hardware == hardware and row.train_seconds is not None
        }
        times = [[its for run, its in timed.items() if run.task == task] for task in all_tasks]
        memory = (row.gpu_bytes or row.resident_bytes for row in complete.values())
        found.append(
            Standing(
                name,
                sizes[name],
                best.rate if best else None,
                tasks,
                Spread(tuple(overall[name])) if overall[name] else None,
                pairs.get(name),
                name in comparable and _is_on_front(name, comparable, sizes),
                _mean_of_means(times),
                len(timed) == len(complete),
                max(filter(None, memory), default=None),
                missing[name],
            )
        )

    def place(its: Standing) -> tuple[bool, int, float]:
        whole_seeds = len(its.overall.values) if its.overall else 0
        return bool(its.missing), -whole_seeds, -scores.get(its.name, -np.inf)

    return sorted(found, key=place)


def sign_of_all(outcome: Outcome) -> int:
    """What turns the metrics of the tasks, which agree in this, so that more is better."""
    return sign_of(next(iter(outcome.prepared.metrics.values())))


def commonest_hardware(outcome: Outcome) -> str | None:
    """What most of the runs that count were made on, whose seconds alone can be compared."""
    rows = [row for row in outcome.finals.values() if row and row.status == "complete"]
    found = Counter(row.hardware for row in rows if row.train_seconds is not None)
    return found.most_common(1)[0][0] if found else None


def values_of(outcome: Outcome) -> Values:
    """What the complete runs that count came to."""
    return {
        (run.entrant, run.task, run.seed): row.value
        for run, row in outcome.finals.items()
        if row and row.status == "complete" and row.value is not None
    }


def pair(name: str, other: str, values: Values, tasks: Sequence[str], sign: int) -> Paired | None:
    """An entrant against another, of the seeds that both have; None where a task has none."""
    by_task = {
        task: [
            sign * (value - values[other, task, seed])
            for (entrant, its, seed), value in values.items()
            if (entrant, its) == (name, task) and (other, task, seed) in values
        ]
        for task in tasks
    }
    if not all(by_task.values()):
        return None
    differences = tuple(its for one in by_task.values() for its in one)
    # Every task weighs as much as another, whatever runs it lacks: as in the mean.
    weighted = [its / len(one) for one in by_task.values() for its in one]
    means = {task: mean(its) for task, its in by_task.items()}
    return Paired(differences, means, sign_flip_p(weighted))


def sign_flip_p(differences: Sequence[float]) -> float:
    """The p-value of a two-sided sign-flip permutation test for a mean of 0.

    If neither method were better, each difference could as well have the other sign: the share of
    all assignments of signs whose mean is at least as far from 0 as the one found. Exact up to 16
    differences; of more, 2^16 assignments are drawn (always the same).
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) <= _EXACT:
        signs = np.array(list(product((1.0, -1.0), repeat=len(values))))
    else:
        drawn = np.random.default_rng(0).integers(0, 2, (2**_EXACT - 1, len(values)))
        signs = np.vstack([np.ones(len(values)), 1.0 - 2.0 * drawn])
    means = np.abs(signs @ values)
    # Sums of the same numbers in another order may differ in the last digits.
    return float(np.mean(means >= abs(values.sum()) - 1e-12 * np.abs(values).sum()))


def least_p(pairs: int) -> float:
    """The smallest p-value that so many differences can have, before any correction."""
    return 2 / 2**pairs if pairs <= _EXACT else 1 / 2**_EXACT


def holm(pairs: Mapping[str, Paired], comparisons: int) -> dict[str, Paired]:
    """Holm's step-down adjustment: several comparisons give several chances of a false one.

    Args:
        pairs: those that can be made by now.
        comparisons: how many there are to be in all, those that lack runs too.
    """
    found: dict[str, Paired] = {}
    highest = 0.0
    for place, name in enumerate(sorted(pairs, key=lambda its: pairs[its].p)):
        its = pairs[name]
        highest = max(highest, min(1.0, (comparisons - place) * its.p))
        found[name] = replace(its, adjusted=highest)
    return found


def _is_on_front(name: str, scores: Mapping[str, float], sizes: Mapping[str, int]) -> bool:
    """Whether no other is at least as good at most as large, and better or smaller."""
    return not any(
        other != name
        and scores[other] >= scores[name]
        and sizes[other] <= sizes[name]
        and (scores[other] > scores[name] or sizes[other] < sizes[name])
        for other in scores
    )


def _mean_of_means(groups: Sequence[Sequence[float]]) -> float | None:
    """The mean over groups of the mean of each; None where one has nothing."""
    return mean(map(mean, groups)) if all(groups) else None


def _missing(rows: Iterable[Row | None], wanted: int) -> dict[str, int]:
    rows = list(rows)
    found = {"not run": wanted} if not rows else {}  # it has no rate to run at yet
    for row in rows:
        status = row.status if row else "not run"
        if status != "complete":
            found[status] = found.get(status, 0) + 1
    return found
