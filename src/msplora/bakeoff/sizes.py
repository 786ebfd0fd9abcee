"""How many numbers each entrant trains, and the rank of a budget; no weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
import transformers

from msplora.errors import ConfigError, MSPLoraError
from msplora.sweep.same_measure import OF_THE_LOSS, changes_the_loss
from msplora.train.absolute_paths import with_absolute_paths
from msplora.train.base_model import Base, base_without_weights
from msplora.train.job import Job
from msplora.train.methods import Adapted, adapt
from msplora.train.metric_order import LOW_IS_BEST, PAIRS_IN_ORDER, sign_of
from msplora.train.quiet import quiet_libraries
from msplora.train.run import prepare_job
from msplora.train.scored_on import ScoredOn, difference
from msplora.train.settings import Settings
from msplora.train.settings_methods import METHOD_SECTIONS

from .budgets import Ranks
from .reading import BakeOff, Run

_RANKS = {"vera": "vera.r", "lily": "lily.r"}
"""Where other methods than those of `adapter.r` have their rank."""
_WITHOUT = {
    "hydra": "it has two ranks: set hydra.r_parallel and hydra.r_sequential",
    "randlora": "it trains less with a larger rank: set randlora.r",
    "full": "it trains everything",
    "frozen": "it trains the head only",
}
"""The methods whose size is not a matter of one rank, and what to do instead."""
_OF_A_METHOD = {"method", "adapter", *METHOD_SECTIONS}
"""A method that sets these keys alone reads a task's data as all others do."""
_PATIENCE = 64
"""So many ranks in a row that a method refuses are no matter of the rank."""
_NEEDS_STORAGE = "vera"
"""PEFT draws its frozen factors when it is put on a model, which needs storage."""


@dataclass(frozen=True)
class Prepared:
    """A bake-off with every rank decided, and what its runs are."""

    bake_off: BakeOff
    sizes: dict[str, int]
    """Entrant -> numbers that its adapter trains, the head of a classifier apart."""
    metrics: dict[str, str]
    """Task -> the metric that it is judged by."""
    ranks: dict[str, str] = field(default_factory=dict)
    """Entrant with a budget -> its rank, as in "adapter.r = 6"."""


def prepare(bake_off: BakeOff, tell: Callable[[str], None] = lambda _: None) -> Prepared:
    """Decide the ranks of budgets, and look at every entrant on every task.

    Raises:
        MSPLoraError: what `msplora train` would refuse: data that is not there, a target that
            matches nothing …; or a budget that no rank reaches.
    """
    settings, looks = bake_off.settings, _Looks()
    sizes: dict[str, int] = {}
    ranks: dict[str, str] = {}
    first, *others = settings.tasks
    # Those of a budget last: it may be the size of another.
    in_order = sorted(bake_off.entrants.values(), key=lambda its: its.budget is not None)
    for name in (its.name for its in in_order):
        tell(f"looking at {name}")
        entrant = bake_off.entrants[name]
        if entrant.budget is not None:
            budget = sizes[entrant.budget] if isinstance(entrant.budget, str) else entrant.budget
            key, rank = _within_budget(bake_off, name, budget, first, looks)
            bake_off, ranks[name] = bake_off.sized(name, key, rank), f"{key} = {rank}"
        sizes[name] = looks.size(bake_off, name, first)
        for task in others:
            tell(f"looking at {name} on {task}")
            size = looks.size(bake_off, name, task)
            is_head_only = _settings_of(bake_off, name, task).method == "frozen"
            if size != sizes[name] and not is_head_only:  # a head is of its task
                raise ConfigError(
                    f"in {bake_off.source}: {name} trains {sizes[name]:,} numbers on {first} and "
                    f"{size:,} on {task}, and sizes are compared. Give both tasks the same model "
                    f"and adapter, or make two bake-offs of them."
                )
    metrics = {task: looks.metrics[task] for task in settings.tasks}
    _check_metrics(metrics, bake_off.source)
    return Prepared(bake_off, {name: sizes[name] for name in bake_off.entrants}, metrics, ranks)


class _Looks:
    """What was seen of tasks and models, so that a task's data is read once for all methods."""

    def __init__(self) -> None:
        self.metrics: dict[str, str] = {}
        """Task -> what its runs are judged by."""
        self._scored_on: dict[str, ScoredOn] = {}
        self._losses: dict[str, dict[str, Any]] = {}
        self._classes: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}

    def size(self, bake_off: BakeOff, name: str, task: str) -> int:
        """What an entrant's adapter trains on a task, which it is refused for where it cannot."""
        settings = _settings_of(bake_off, name, task)
        its_own = bake_off.entrants[name].content.keys() - _OF_A_METHOD
        # Of two runs that differ in their data only, the adapters are alike.
        same = settings.model_dump_json(exclude={"data", "output", "seed"})
        if task in self._classes and not its_own and same in self._sizes:
            return self._sizes[same]
        try:
            if task in self._classes and not its_own:
                with quiet_libraries():
                    base = _base(settings, self._classes[task])
                    size = _size(adapt(base, settings), base, settings)
            else:
                size = self._read(settings, task)
        except MSPLoraError as error:
            raise ConfigError(f"in {bake_off.source} ({name} on {task}): {error}") from error
        self._sizes[same] = size
        return size

    def classes(self, task: str) -> Any:
        """The classes of a task whose data was read, None where it has none."""
        return self._classes[task]

    def _read(self, settings: Settings, task: str) -> int:
        job, classes = _without_weights(settings)
        metric = self.metrics.setdefault(task, job.best)
        if job.best != metric:
            raise ConfigError(
                f"it would be judged by {job.best}, and the methods before it are by {metric}. "
                f"Methods of one bake-off have the same kind of task."
            )
        self._check_measure(job, task)
        self._classes.setdefault(task, classes)
        return _size(job.adapted, job.base, settings)

    def _check_measure(self, job: Job, task: str) -> None:
        """Refuse a method whose metric would be of another formula, or of other rows or tokens."""
        its = job.record.settings
        loss = {key: attrgetter(key)(its) for key in OF_THE_LOSS if changes_the_loss(key, its)}
        before = self._losses.setdefault(task, loss)
        if of_one := sorted(loss.keys() ^ before.keys()):
            raise ConfigError(
                f"{of_one[0]} belongs to its loss or to that of a method before it, and not to "
                f"both: they would be judged by two losses of one name. Methods of one bake-off "
                f"have the same kind of task."
            )
        changed = next((key for key in loss if loss[key] != before[key]), None)
        if changed:
            raise ConfigError(
                f"{changed} = {loss[changed]} and {before[changed]} of a method before it make two "
                f"losses of one name. Set it in base or in the task, or set "
                f"training.metric_for_best: {PAIRS_IN_ORDER} there."
            )
        scored_on = ScoredOn.of(job)
        found = scored_on and difference([self._scored_on.setdefault(task, scored_on), scored_on])
        if found:
            raise ConfigError(
                f"it and a method before it would be scored on {found}, and could not be compared. "
                f"Set what changes that in base or in the task."
            )


def _settings_of(bake_off: BakeOff, name: str, task: str) -> Settings:
    run = Run(name, task, bake_off.entrants[name].rates[0], bake_off.settings.seeds[0])
    return with_absolute_paths(bake_off.settings_of(run))


def _without_weights(settings: Settings) -> tuple[Job, Any]:
    """The job of a run, and the classes that its base was made for."""
    made_for = []

    def load(settings: Settings, classes: Any) -> Any:
        made_for.append(classes)
        return _base(settings, classes)

    with quiet_libraries():
        transformers.set_seed(settings.seed)
        return prepare_job(settings, load), made_for[0]


def _base(settings: Settings, classes: Any) -> Any:
    with torch.device("meta"):
        base = base_without_weights(settings, classes)
    if settings.method == _NEEDS_STORAGE:
        base.model.to_empty(device="cpu")  # room that is never written to, and so takes none
    return base


def _size(adapted: Adapted, base: Base, settings: Settings) -> int:
    """What the adapter trains; of a method without one, everything that trains but the head, or
    the head where that is all.
    """
    trainable = adapted.trainable
    if settings.method == "full":
        heads = [base.model.get_submodule(name).parameters() for name in base.head]
        return trainable.total - sum(its.numel() for head in heads for its in head)
    return trainable.adapter or trainable.total


def _within_budget(
    bake_off: BakeOff, name: str, budget: int, task: str, looks: _Looks
) -> tuple[str, int]:
    """The key of an entrant's rank, and the rank."""
    settings = _settings_of(bake_off, name, task)
    where = f"in {bake_off.source}: {name} with a budget of {budget:,}"
    if settings.method in _WITHOUT:
        raise ConfigError(
            f"{where}: method {settings.method!r} has no one rank to fit to a budget, "
            f"{_WITHOUT[settings.method]} and leave budget out."
        )
    key = _RANKS.get(settings.method, "adapter.r")
    decided = "adapter.ranks" if settings.adapter.ranks is not None else ""
    if settings.method == "adalora" and settings.adalora.init_r is not None:
        decided = "adalora.init_r"
    if decided:
        raise ConfigError(
            f"{where}: {decided} gives its size already. Leave {decided} or budget out."
        )
    some = _some_rank(settings)
    # What is wrong with the method at any rank is said here, and not looked for at every rank.
    looks.size(bake_off.sized(name, key, some), name, task)
    classes = looks.classes(task)

    def size(rank: int) -> int:
        its = _settings_of(bake_off.sized(name, key, rank), name, task)
        with quiet_libraries():
            return adapt(_base(its, classes), its).trainable.adapter

    ranks = Ranks(size, patience=max(_PATIENCE, some))
    try:
        rank, found = ranks.smallest(budget)
    except MSPLoraError as error:
        raise ConfigError(f"{where}: {error}") from error
    if found < budget:
        raise ConfigError(
            f"{where}: no {key} up to {rank:,} trains as much; {key} = {rank:,} trains {found:,}. "
            f"Give a smaller budget."
        )
    if found > budget * (1 + bake_off.settings.budget_within):
        said = f"{key} = {rank} trains {found:,}"
        if below := ranks.below(rank):
            said = f"{key} = {below[0]} trains {below[1]:,} and {said}"
        raise ConfigError(
            f"{where}: no rank comes near it: {said}, the nearest there are. Give one of these as "
            f"the budget, or a larger budget_within."
        )
    return key, rank


def _some_rank(settings: Settings) -> int:
    """A rank that the method takes whatever else is set."""
    return settings.gralora.gralora_k * 4 if settings.method == "gralora" else 8


def _check_metrics(metrics: dict[str, str], source: str) -> None:
    by_sign: dict[int, str] = {}
    for task, metric in metrics.items():
        by_sign.setdefault(sign_of(metric), f"{task} by {metric}")
    if len(by_sign) > 1:
        raise ConfigError(
            f"in {source}: {' and '.join(by_sign.values())} have no mean, for less is better of "
            f"one and more of the other. Make two bake-offs of them."
        )
    named = {metric: task for task, metric in metrics.items()}
    if named.keys() >= set(LOW_IS_BEST):
        both = " and ".join(f"{named[its]} by {its}" for its in LOW_IS_BEST)
        raise ConfigError(
            f"in {source}: {both} have no mean: a perplexity is the exponential of a loss, and "
            f"would drown it. Set training.metric_for_best to the same for both."
        )
