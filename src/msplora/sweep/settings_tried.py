"""The settings of a sweep: each with the rows of its seeds, and which of them comes next."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

from msplora.train.metric_order import sign_of

from .reading import Parameters, Sweep, searched_values
from .rows import Row, Rows

METHOD = "method"


@dataclass(frozen=True)
class Setting:
    """Parameters, and the row of each seed; None for a run that was not started."""

    parameters: Parameters
    rows: dict[int | None, Row | None]

    @property
    def complete(self) -> list[Row]:
        """The rows of the runs that are complete."""
        return self.having("complete")

    @property
    def values(self) -> list[float]:
        """The metric of each complete run."""
        return [row.value for row in self.complete if row.value is not None]

    @property
    def is_whole(self) -> bool:
        """Whether every seed's run is complete."""
        return len(self.complete) == len(self.rows)

    @property
    def score(self) -> float | None:
        """The mean over the seeds, turned so that more is better."""
        if not self.values:
            return None
        return sign_of(self.complete[0].metric) * mean(self.values)

    @property
    def method(self) -> str | None:
        """What it is compared within: the best setting of each method is marked."""
        return self.parameters.get(METHOD)

    def having(self, status: str) -> list[Row]:
        """The rows of a status."""
        return [row for row in self.rows.values() if row and row.status == status]


def setting_of(sweep: Sweep, rows: Rows, parameters: Parameters) -> Setting:
    """A setting as far as it has been run."""
    found = {seed: rows.find(sweep.settings_of(parameters, seed)) for seed in sweep.seeds}
    return Setting(parameters, found)


def settings_so_far(sweep: Sweep, rows: Rows) -> list[Setting]:
    """All settings of the grid, and of a search those that were tried."""
    return [
        setting_of(sweep, rows, parameters)
        for combination in sweep.combinations()
        for parameters in _tried(sweep, rows, combination)
    ]


def settings_to_run(sweep: Sweep, rows: Rows) -> Iterator[Setting]:
    """Every setting in turn; those of a search are chosen when their turn has come."""
    for combination in sweep.combinations():
        for parameters in _tried(sweep, rows, combination):
            yield setting_of(sweep, rows, parameters)
        before = -1
        while sweep.settings.search:
            tried = [setting_of(sweep, rows, its) for its in _tried(sweep, rows, combination)]
            # As many as before: what was tried is not known again, and would be tried for ever.
            if len(tried) >= sweep.settings.trials or len(tried) == before:
                break
            before = len(tried)
            chosen = _choose(sweep, tried)
            if chosen is None:  # the search knows no other values
                break
            yield setting_of(sweep, rows, {**combination, **chosen})


def rank(setting: Setting) -> tuple[bool, float]:
    """Sorts the best first; a setting without all of its seeds comes after those with them."""
    score = setting.score
    return (not setting.is_whole, math.inf if score is None else -score)


def _tried(sweep: Sweep, rows: Rows, combination: Parameters) -> list[Parameters]:
    """The first `trials` settings of a combination that were tried; without a search, itself."""
    search = sweep.settings.search
    if not search:
        return [combination]
    found: list[Parameters] = []
    for row in rows:
        values = searched_values(row.config, search)
        parameters = {**combination, **(values or {})}
        if values is None or parameters in found:
            continue
        if rows.find(sweep.settings_of(parameters, row.seed)) is row:
            found.append(parameters)
    return found[: sweep.settings.trials]


def _choose(sweep: Sweep, tried: list[Setting]) -> Parameters | None:
    from .search import Trial, suggest  # needs optuna, as grids do not

    search = sweep.settings.search
    trials = []
    for setting in tried:
        values = {key: setting.parameters[key] for key in search}
        if setting.having("diverged"):
            trials.append(Trial(values, "diverged"))
        elif setting.is_whole:
            trials.append(Trial(values, "complete", setting.score))
        else:
            trials.append(Trial(values, "failed"))
    return suggest(search, trials, sweep.settings.sampler_seed)
