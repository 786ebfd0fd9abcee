"""What to try next: optuna, over the settings that were tried before.

The study is made anew from the results each time, and every draw has a seed of its own. So a search
that was interrupted goes on as if it had not been, and may be given another range or more trials.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import optuna

from .reading import Parameters, is_whole
from .settings import SearchSettings

_ATTEMPTS = 100


@dataclass(frozen=True)
class Trial:
    """Values that were tried, and how good they were: the higher the score the better."""

    values: Parameters
    state: Literal["complete", "diverged", "failed"]
    score: float | None = None


def suggest(
    search: Mapping[str, SearchSettings], trials: Sequence[Trial], seed: int
) -> Parameters | None:
    """Return values that were not tried yet; None where a hundred draws found none."""
    tried = [trial.values for trial in trials]
    for attempt in range(_ATTEMPTS):
        drawn = _draw(search, trials, random.Random(f"{seed}/{len(trials)}/{attempt}"))
        if drawn not in tried:
            return drawn
    return None


def _draw(
    search: Mapping[str, SearchSettings], trials: Sequence[Trial], chance: random.Random
) -> Parameters:
    distributions = {key: _distribution(key, its) for key, its in search.items()}
    with _quietly():
        sampler = optuna.samplers.TPESampler(seed=chance.getrandbits(32))
        study = optuna.create_study(direction="maximize", sampler=sampler)
        states = {
            "complete": optuna.trial.TrialState.COMPLETE,
            # The sampler takes a pruned trial for worse than all that were completed.
            "diverged": optuna.trial.TrialState.PRUNED,
            "failed": optuna.trial.TrialState.FAIL,
        }
        for trial in trials:
            study.add_trial(
                optuna.trial.create_trial(
                    state=states[trial.state],
                    params=trial.values,
                    distributions=distributions,
                    value=trial.score,
                )
            )
        drawn = study.ask(fixed_distributions=distributions).params
    return {key: _rounded(drawn[key], its) for key, its in search.items()}


def _distribution(key: str, searched: SearchSettings) -> optuna.distributions.BaseDistribution:
    if searched.choices is not None:
        return optuna.distributions.CategoricalDistribution(searched.choices)
    assert searched.low is not None
    assert searched.high is not None
    if is_whole(key):
        return optuna.distributions.IntDistribution(
            int(searched.low), int(searched.high), log=searched.log
        )
    return optuna.distributions.FloatDistribution(searched.low, searched.high, log=searched.log)


def _rounded(value: Any, searched: SearchSettings) -> Any:
    """Four digits say as much of a rate as seventeen, and can be read and typed."""
    if not isinstance(value, float) or searched.low is None or searched.high is None:
        return value
    return min(max(float(f"{value:.4g}"), searched.low), searched.high)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without a line per study and trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
