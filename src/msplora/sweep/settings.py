"""The configuration of a sweep, typed: every key, its default and what it means.

The descriptions are the documentation: docs/training.md is checked against them by a test.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

Choice = StrictBool | StrictInt | StrictFloat | StrictStr


class SearchSettings(BaseModel):
    """Where the value of one key is searched: in a range, or among choices."""

    model_config = ConfigDict(extra="forbid")

    low: float | None = Field(None, description="The lowest value, of a key that is a number.")
    high: float | None = Field(None, description="The highest value.")
    log: bool = Field(
        False, description="Search the range by factors, as suits learning rates and ranks."
    )
    choices: list[Choice] | None = Field(
        None, min_length=2, description="Instead of a range, the values to choose from."
    )


class SweepSettings(BaseModel):
    """A sweep."""

    model_config = ConfigDict(extra="forbid")

    output: str = Field(description="The folder of the sweep, with its table, plot and runs.")
    base: str | None = Field(
        None, description="Config file that every run starts from; its `output` is not used."
    )
    config: dict[str, Any] | None = Field(
        None, description="Instead of `base`, the config itself, by sections."
    )
    grid: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="Key -> list of its values, as in `{training.learning_rate: [1e-4, 3e-4]}`; "
        "all combinations are run.",
    )
    search: dict[str, SearchSettings] = Field(
        default_factory=dict,
        description="Key -> where optuna is to search it: a [range or choices](#a-searched-key). "
        "With `grid` too, each of its combinations is searched for itself.",
    )
    trials: int = Field(20, ge=1, description="How many settings each search tries.")
    sampler_seed: int = Field(0, ge=0, description="Seeds the search.")
    seeds: list[int] | None = Field(
        None,
        min_length=1,
        description="Run every setting with each of these seeds; the table has their mean, lowest "
        "and highest.",
    )
    keep: Literal["all", "best"] = Field(
        "all",
        description="Which run folders stay: all, or those of the best setting of each method.",
    )
    isolate: bool = Field(
        True,
        description="Give each run a process of its own, so that no crash and no lack of memory "
        "ends the others; `false` saves the seconds that a process takes to start.",
    )
