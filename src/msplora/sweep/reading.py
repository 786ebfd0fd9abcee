"""Read a sweep's file, and check all that can be checked before the first run."""

from __future__ import annotations

import copy
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from msplora.errors import ConfigError, nearest
from msplora.train.absolute_paths import PATHS, absolute_value, with_absolute_paths
from msplora.train.metric_order import PAIRS_IN_ORDER
from msplora.train.problems import described, together
from msplora.train.same_settings import flat, free_to_change
from msplora.train.settings import Settings
from msplora.train.settings_checks import has_validation
from msplora.train.settings_file import make_settings, put, read_content

from .naming import shown
from .same_measure import changes_the_loss, changes_what_is_scored
from .settings import SearchSettings, SweepSettings

SEED = "seed"
# Runs that differ in these have no common measure, or no place of their own.
_NOT_SWEPT = {
    "output": "each run gets its own folder below the output of the sweep",
    "task": "runs of different tasks have no metric in common",
    "training.metric_for_best": "it is what the runs are compared by; set it in the base config",
}

_DEFAULTS = flat(Settings(model="", task="sft", output="").to_dict())  # pyright: ignore

Parameters = dict[str, Any]
"""Dotted key -> the value that a run has instead of the base config's."""


@dataclass(frozen=True)
class Sweep:
    """A sweep whose every combination is a config that can be run, as far as one can tell."""

    settings: SweepSettings
    base: dict[str, Any]
    """The base config as it was given, unchecked."""
    source: str
    """The file it is from, for messages."""

    @property
    def output(self) -> Path:
        """The folder of the sweep."""
        return Path(self.settings.output).expanduser().resolve()

    @property
    def swept(self) -> list[str]:
        """The keys that differ from run to run, but for the seed of `seeds`."""
        return [*self.settings.grid, *self.settings.search]

    @property
    def seeds(self) -> list[int | None]:
        """The seeds of every setting; None where they are the config's own."""
        return list(self.settings.seeds or [None])

    @property
    def count(self) -> int:
        """How many runs it has."""
        size = len(self.seeds) * (self.settings.trials if self.settings.search else 1)
        for values in self.settings.grid.values():
            size *= len(values)
        return size

    def combinations(self) -> Iterator[Parameters]:
        """The combinations of the grid, the first key changing slowest; one, empty, without it."""
        grid = self.settings.grid
        for values in product(*grid.values()):
            yield dict(zip(grid, values, strict=True))

    def settings_of(
        self, parameters: Mapping[str, Any], seed: int | None = None, output: str = "run"
    ) -> Settings:
        """The settings of one run, with absolute paths.

        Raises:
            ConfigError: there is no such run.
        """
        content = copy.deepcopy(self.base)
        changes = {**parameters} if seed is None else {**parameters, SEED: seed}
        told = ", ".join(f"{key} = {shown(value)}" for key, value in changes.items())
        source = f"{self.source} ({told})" if told else self.source
        for key, value in changes.items():
            put(content, key, value, source)
        content["output"] = output
        return with_absolute_paths(make_settings(content, source), must_exist=False)

    def shared(self) -> Settings:
        """The settings of the base config; of the first run where it lacks what is swept.

        Raises:
            ConfigError: neither can be run.
        """
        try:
            return self.settings_of({})
        except ConfigError:
            return self.settings_of({**next(self.combinations()), **_usual(self)})

    def as_file(self) -> dict[str, Any]:
        """What to write for the next time: with the base config itself, and absolute paths."""
        content = self.settings.model_dump(mode="json", exclude_defaults=True)
        content.pop("base", None)
        content["output"], content["config"] = str(self.output), copy.deepcopy(self.base)
        there = flat(self.base)
        for key in PATHS:
            if there.get(key) and key != "output":
                put(content["config"], key, absolute_value(key, there[key]), self.source)
            if key in self.settings.grid:
                content["grid"][key] = [absolute_value(key, its) for its in self.settings.grid[key]]
        return content


def read_sweep(file: Path | str, output: str | None = None) -> Sweep:
    """Return the sweep of a YAML file, with another `output` if one is given.

    Raises:
        ConfigError: it cannot be read, or one of its runs could not be started.
    """
    content = read_content(file, "at least output, base or config, and grid, search or seeds")
    if output is not None:
        content["output"] = output
    return make_sweep(content, str(file))


def make_sweep(content: Mapping[str, Any], source: str) -> Sweep:
    """Return a checked sweep; `source` names where `content` came from in errors."""
    try:
        settings = SweepSettings.model_validate(dict(content))
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from None
    if (settings.base is None) == (settings.config is None):
        found = "both" if settings.base is not None else "neither"
        raise ConfigError(
            f"in {source}: give the config that the runs start from as base (a file) or under "
            f"config; found {found}."
        )
    base = read_content(settings.base) if settings.base is not None else settings.config
    sweep = Sweep(settings, base or {}, source)
    _check_keys(sweep)
    for key, searched in settings.search.items():
        _check_searched(key, searched, source)
    for key, searched in settings.search.items():
        if searched.choices is not None:  # which are compared with those of the runs
            searched.choices = _as_held(sweep, key, searched.choices)
    _check_runs(sweep)
    return sweep


def searched_values(
    config: Mapping[str, Any], search: Mapping[str, SearchSettings]
) -> Parameters | None:
    """The values of the searched keys in a run's flat config; None where one was not among them."""
    found: Parameters = {}
    for key, searched in search.items():
        value = config.get(key, _DEFAULTS.get(key))
        if searched.choices is not None:
            # Not `in`: true is no 1.
            same = [
                its
                for its in searched.choices
                if its == value and isinstance(its, bool) == isinstance(value, bool)
            ]
            if not same:
                return None
            found[key] = same[0]
        else:
            assert searched.low is not None
            assert searched.high is not None
            if not (_is_number(value) and searched.low <= value <= searched.high):
                return None
            found[key] = value
    return found


def is_whole(key: str) -> bool:
    """Whether a key of a run's config takes whole numbers only."""
    model: Any = Settings
    for part in key.split("."):
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return False
        model = field.annotation
    kinds = typing.get_args(model) if isinstance(model, types.UnionType) else (model,)
    return int in kinds and float not in kinds


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_keys(sweep: Sweep) -> None:
    settings, source = sweep.settings, sweep.source
    if not sweep.swept and not settings.seeds:
        raise ConfigError(
            f"in {source}: nothing to sweep. Give lists of values under grid, ranges under search, "
            f"or seeds."
        )
    both = [key for key in settings.grid if key in settings.search]
    if both:
        raise ConfigError(f"in {source}: grid and search both name {both[0]!r}. Choose one.")
    sections = [
        name
        for name, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    ]
    for key in sweep.swept:
        if key in _NOT_SWEPT:
            raise ConfigError(f"in {source}: {key} cannot be swept: {_NOT_SWEPT[key]}.")
        if key in sections:
            raise ConfigError(
                f"in {source}: {key!r} is a section. Name a key in it, as in {key}.KEY."
            )
    for key, values in settings.grid.items():
        if not values:
            raise ConfigError(f"in {source}: grid.{key} is empty. Give it values, or take it out.")
    if settings.seeds and SEED in sweep.swept:
        raise ConfigError(
            f"in {source}: seeds are averaged over, and {SEED!r} is swept besides. Choose one."
        )
    for name, values in {**settings.grid, "seeds": settings.seeds or []}.items():
        twice = [value for place, value in enumerate(values) if value in values[:place]]
        if twice:
            raise ConfigError(f"in {source}: {name} has {shown(twice[0])} twice.")


def _check_searched(key: str, searched: SearchSettings, source: str) -> None:
    where = f"in {source}: search.{key}"
    low, high = searched.low, searched.high
    if searched.choices is not None:
        if low is not None or high is not None or searched.log:
            raise ConfigError(f"{where} has choices and a range. Give one of them.")
        return
    if low is None or high is None:
        raise ConfigError(f"{where} needs low and high, or choices.")
    if not low < high:
        raise ConfigError(f"{where}: low = {low:g} is not below high = {high:g}.")
    if searched.log and low <= 0:
        raise ConfigError(f"{where}: low = {low:g}, and a range by factors (log) is above 0.")
    if is_whole(key) and not (low.is_integer() and high.is_integer()):
        raise ConfigError(f"{where} runs from {low:g} to {high:g}, but takes whole numbers only.")


def _check_runs(sweep: Sweep) -> None:
    """Make the settings of every run that is known, and of the ends of what is searched."""
    ends = {key: _ends(key, searched) for key, searched in sweep.settings.search.items()}
    usual = _usual(sweep)
    sweep.shared()
    for combination in sweep.combinations():
        for key, values in ends.items():
            for value in values[1:]:
                found = sweep.settings_of({**combination, **usual, key: value})
                if key in free_to_change(found.method):
                    raise ConfigError(
                        f"in {sweep.source}: {key} cannot be searched: it changes no result, so "
                        f"its values would all be one run. Set it in the base config."
                    )
        found, *_ = [sweep.settings_of({**combination, **usual}, seed) for seed in sweep.seeds]
        if not has_validation(found):
            raise ConfigError(
                f"in {sweep.source}: the runs are compared on held-out rows, and there are none: "
                f"set data.validation, data.validation_split or data.validation_fraction above 0."
            )
        _check_measure(sweep, found)
        if found.devices.processes > 1 and not sweep.settings.isolate:
            raise ConfigError(
                f"in {sweep.source}: devices.processes = {found.devices.processes} needs processes "
                f"of their own. Leave isolate out."
            )


def _usual(sweep: Sweep) -> Parameters:
    """One value of each key that is searched."""
    return {key: _ends(key, searched)[0] for key, searched in sweep.settings.search.items()}


def _as_held(sweep: Sweep, key: str, choices: list[Any]) -> list[Any]:
    """Choices as a run's settings hold them: a number is one in quotes too, a path absolute."""
    others = {**next(sweep.combinations()), **_usual(sweep)}
    held = [
        flat(sweep.settings_of({**others, key: its}).model_dump(mode="json")).get(key, its)
        for its in choices
    ]
    twice = next((its for place, its in enumerate(held) if its in held[:place]), None)
    if twice is not None:
        raise ConfigError(f"in {sweep.source}: search.{key} has {shown(twice)} twice.")
    return held


def _check_measure(sweep: Sweep, found: Settings) -> None:
    """Refuse to compare losses of different formulas, and to have a search follow such differences.

    What a grid's runs were scored on is seen in their results.
    """
    for key in sweep.swept:
        if changes_the_loss(key, found):
            raise ConfigError(
                f"in {sweep.source}: {key} cannot be swept where runs are compared by "
                f"{found.training.metric_for_best or 'loss'}: it changes how that is computed. Set "
                f"training.metric_for_best: {PAIRS_IN_ORDER} in the base config."
            )
        if key in sweep.settings.search and changes_what_is_scored(key, found):
            raise ConfigError(
                f"in {sweep.source}: {key} cannot be searched: it changes which rows or tokens a "
                f"run is scored on, and the search would follow that. Give its values under grid: "
                f"each is searched for itself."
            )


def _ends(key: str, searched: SearchSettings) -> list[Any]:
    if searched.choices is not None:
        return list(searched.choices)
    kind = int if is_whole(key) else float
    return [kind(end) for end in (searched.low, searched.high) if end is not None]


def _explain(error: ValidationError, source: str) -> str:
    return together((_sentence(problem) for problem in error.errors()), source)


def _sentence(problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    if problem["type"] == "missing":
        return described(problem, ".".join(path))
    inside = path[0] == "search"
    if problem["type"] != "extra_forbidden":
        # Members of a union are in the location too.
        return described(problem, ".".join(path[: 3 if inside else 2]))
    known = (SearchSettings if inside else SweepSettings).model_fields
    hint = nearest(path[-1], known, count=1) or f" Known here: {', '.join(known)}."
    if not inside and path[0] in Settings.model_fields:
        hint = f" Keys of the runs stand under config, as in config: {{{path[0]}: …}}."
    return described(problem, ".".join(path), hint)
