"""Read a bake-off's file, and check all that can be checked without reading data."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from msplora.errors import ConfigError, nearest
from msplora.train.problems import described, together
from msplora.train.settings import Settings
from msplora.train.settings_checks import has_validation
from msplora.train.settings_file import make_settings, overridden, put, read_content

from .settings import BakeOffSettings, ChooseSettings, RejectSettings

_SECTIONS: dict[str, type[BaseModel]] = {"choose": ChooseSettings, "reject": RejectSettings}
_RATE = "training.learning_rate"
_RESERVED = {
    "output": "each run gets its own folder below the output of the bake-off",
    "seed": "it is among the `seeds`",
    _RATE: "each method chooses it from `learning_rates`",
}
"""Keys of a run that a bake-off decides itself."""


@dataclass(frozen=True)
class Entrant:
    """A method with its size: what is compared."""

    name: str
    content: Mapping[str, Any]
    """The keys of `msplora train` that make it."""
    rates: tuple[float, ...]
    """The learning rates to choose from, in the order in which they are tried."""
    budget: int | str | None = None
    """How many numbers it is to train, or the name of the method whose size it is to have."""


@dataclass(frozen=True)
class Run:
    """One training run of a bake-off."""

    entrant: str
    task: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        rate = f"learning_rate={self.learning_rate:g}"
        return ",".join([self.task, self.entrant, rate, f"seed={self.seed}"])

    @property
    def parameters(self) -> dict[str, Any]:
        """What tells it apart from the others."""
        return {
            "method": self.entrant,
            "task": self.task,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Run:
        """The run that these `parameters` tell apart from the others."""
        its = parameters
        return cls(its["method"], its["task"], its["learning_rate"], its["seed"])


@dataclass(frozen=True)
class BakeOff:
    """A bake-off whose every run has settings that are allowed together."""

    settings: BakeOffSettings
    entrants: Mapping[str, Entrant]
    source: str
    """The file it is from, for messages."""

    @property
    def output(self) -> Path:
        """The folder of the bake-off."""
        return Path(self.settings.output).expanduser().resolve()

    @property
    def baseline(self) -> str:
        """The entrant that the others are compared with."""
        return self.settings.baseline or next(iter(self.entrants))

    @property
    def choose_tasks(self) -> list[str]:
        """The tasks that rates are chosen on."""
        return self.settings.choose.tasks or list(self.settings.tasks)

    @property
    def choose_seeds(self) -> list[int]:
        """The seeds that rates are chosen on."""
        return self.settings.choose.seeds or self.settings.seeds[:1]

    def settings_of(self, run: Run) -> Settings:
        """The settings of one run.

        Raises:
            ConfigError: no such run is allowed.
        """
        content: dict[str, Any] = {}
        for part in (
            self.settings.base,
            self.settings.tasks[run.task],
            self.entrants[run.entrant].content,
        ):
            content = _merged(content, part)
        source = f"{self.source} ({run.entrant} on {run.task})"
        put(content, _RATE, run.learning_rate, source)
        content |= {"seed": run.seed, "output": str(self.output / "runs" / run.name)}
        return make_settings(content, source)

    def method_of(self, name: str) -> str:
        """The `method` of an entrant's runs."""
        task, seed = next(iter(self.settings.tasks)), self.settings.seeds[0]
        return self.settings_of(Run(name, task, self.entrants[name].rates[0], seed)).method

    def sized(self, name: str, key: str, rank: int) -> BakeOff:
        """The same bake-off, in which an entrant has the rank that its budget asks for."""
        entrant = self.entrants[name]
        content = copy.deepcopy(dict(entrant.content))
        put(content, key, rank, self.source)
        return replace(self, entrants={**self.entrants, name: replace(entrant, content=content)})


def read_bake_off(
    file: Path | str, overrides: Iterable[str] = (), output: str | None = None
) -> BakeOff:
    """Return the bake-off of a YAML file, changed by `overrides` ("dotted.key=value").

    Another `output` may be given.

    Raises:
        ConfigError: it cannot be read, or one of its runs could not be started.
    """
    content = read_content(file, "at least output, base, tasks, methods and learning_rates")
    source = overridden(content, overrides, str(file))
    if output is not None:
        content["output"] = output
    return make_bake_off(content, source)


def make_bake_off(content: Mapping[str, Any], source: str) -> BakeOff:
    """Return a checked bake-off; `source` names where `content` came from in errors."""
    try:
        settings = BakeOffSettings.model_validate(dict(content))
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from None
    entrants = {its.name: its for its in _entrants(settings, source)}
    bake_off = BakeOff(settings, entrants, source)
    _check(bake_off)
    return bake_off


def _entrants(settings: BakeOffSettings, source: str) -> Iterable[Entrant]:
    for name, given in settings.methods.items():
        content = dict(given)
        rates = _rates(content.pop("learning_rates", settings.learning_rates), name, source)
        budgets = content.pop("budget", None)
        if not isinstance(budgets, list):
            yield Entrant(name, content, rates, _budget(budgets, name, settings, source))
            continue
        if not budgets or len({str(its) for its in budgets}) < len(budgets):
            raise ConfigError(
                f"in {source}: methods.{name}: budget = {budgets!r}: a list should hold at least "
                f"one, and none twice."
            )
        for budget in budgets:
            its = _budget(budget, name, settings, source)
            yield Entrant(f"{name}@{its}", content, rates, its)


def _rates(given: Any, name: str, source: str) -> tuple[float, ...]:
    try:
        rates = [rounded(float(its)) for its in given]
        are_rates = all(0 < its < math.inf for its in rates)
        if not rates or not are_rates or len(set(rates)) < len(rates):
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigError(
            f"in {source}: methods.{name}: learning_rates = {given!r}: it should be a list of "
            f"numbers above 0 that differ in their first six digits."
        ) from None
    return tuple(rates)


def rounded(rate: float) -> float:
    """As a person would write it: it becomes part of a name, which has to give it back."""
    return float(f"{rate:.6g}")


def _budget(given: Any, name: str, settings: BakeOffSettings, source: str) -> int | str | None:
    where = f"in {source}: methods.{name}: budget = {given!r}"
    if given is None:
        return None
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return given
    if not isinstance(given, str):
        raise ConfigError(
            f"{where}: it should be a number of parameters, or the name of another method."
        )
    others = [its for its in settings.methods if its != name]
    if given not in others:
        raise ConfigError(
            f"{where} names no other method.{nearest(given, others, count=1)} "
            f"There are: {', '.join(others) or 'none'}."
        )
    if "budget" in settings.methods[given]:
        raise ConfigError(
            f"{where}: the size of {given} follows from a budget itself. Name that budget."
        )
    return given


def _check(bake_off: BakeOff) -> None:
    settings, source = bake_off.settings, bake_off.source
    for what, names in (("tasks", settings.tasks), ("methods", settings.methods)):
        for name in names:
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ConfigError(
                    f"in {source}: {what}.{name}: a name becomes part of a folder's. Use letters, "
                    f"digits, '.', '+', '-' and '_'."
                )
    for task in settings.choose.tasks or []:
        _check_known("choose.tasks", task, settings.tasks, source)
    _check_known("baseline", bake_off.baseline, bake_off.entrants, source)
    lists: dict[str, list[Any]] = {
        "seeds": settings.seeds,
        "choose.seeds": settings.choose.seeds or [],
        "choose.tasks": settings.choose.tasks or [],
    }
    for what, values in lists.items():
        twice = next((its for its in values if values.count(its) > 1), None)
        if twice is not None:
            raise ConfigError(f"in {source}: {what} = {values} has {twice!r} twice. Leave one out.")
    for key, why in _RESERVED.items():
        parts = {"base": settings.base}
        parts |= {f"tasks.{name}": its for name, its in settings.tasks.items()}
        parts |= {f"methods.{name}": its for name, its in settings.methods.items()}
        for where, content in parts.items():
            if _has(content, key):
                raise ConfigError(f"in {source}: {where} has {key!r}: {why}. Leave it out.")
    for name, content in settings.methods.items():
        if _has(content, "training.metric_for_best"):
            raise ConfigError(
                f"in {source}: methods.{name} has 'training.metric_for_best': all methods are "
                f"judged by the same on a task. Set it in base or in the task."
            )
    for entrant in bake_off.entrants.values():
        for task in settings.tasks:
            run = Run(entrant.name, task, entrant.rates[0], settings.seeds[0])
            if not has_validation(bake_off.settings_of(run)):
                raise ConfigError(
                    f"in {source}: methods are compared on held-out rows, and task {task} has "
                    f"none: set data.validation, data.validation_split or "
                    f"data.validation_fraction above 0."
                )


def _has(content: Any, key: str) -> bool:
    """Whether a dotted key is set."""
    for part in key.split("."):
        if not isinstance(content, Mapping) or part not in content:
            return False
        content = content[part]
    return True


def _check_known(key: str, name: str, known: Iterable[str], source: str) -> None:
    known = list(known)
    if name not in known:
        raise ConfigError(
            f"in {source}: {key} names {name!r}, and there is none.{nearest(name, known, count=1)} "
            f"There are: {', '.join(known)}."
        )


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; anything else is replaced."""
    found = copy.deepcopy(dict(below))
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(found.get(key), Mapping):
            found[key] = _merged(found[key], value)
        else:
            found[key] = copy.deepcopy(value)
    return found


def _explain(error: ValidationError, source: str) -> str:
    return together((_sentence(problem) for problem in error.errors()), source)


def _sentence(problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    hint = ""
    if problem["type"] == "extra_forbidden":
        known = _SECTIONS.get(path[0], BakeOffSettings).model_fields
        hint = nearest(path[-1], known, count=1) or f" Known here: {', '.join(known)}."
        if len(path) == 1 and path[0] in Settings.model_fields:
            hint = f" Keys of the runs stand under base, as in base: {{{path[0]}: …}}."
    return described(problem, ".".join(path), hint)
