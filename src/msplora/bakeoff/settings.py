"""The configuration of a bake-off, typed: every key, its default and what it means.

The descriptions are the documentation: docs/bake-off.md is checked against them by a test.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Rates = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]


class ChooseSettings(BaseModel):
    """What each method's learning rate is chosen on."""

    model_config = ConfigDict(extra="forbid")

    tasks: list[str] | None = Field(
        None, min_length=1, description="Names of the tasks; all of them if unset."
    )
    seeds: list[int] | None = Field(
        None, min_length=1, description="The seeds; the first of `seeds` if unset."
    )
    extend: int = Field(
        1,
        ge=0,
        description="Where a method's best rate is the lowest or the highest tried, try the next "
        "one beyond it, at most so many times.",
    )


class RejectSettings(BaseModel):
    """When a learning rate is given up before its run is over, while rates are chosen."""

    model_config = ConfigDict(extra="forbid")

    after: float = Field(
        0.4, gt=0, lt=1, description="No run is rejected before this share of its training."
    )
    behind: float = Field(
        gt=0,
        description="A run is rejected where its best value so far is worse by more than this than "
        "what another rate of the same method, task and seed had reached by then.",
    )


class BakeOffSettings(BaseModel):
    """A bake-off."""

    model_config = ConfigDict(extra="forbid")

    output: str = Field(description="The folder of the bake-off, with its report and its runs.")
    base: dict[str, Any] = Field(
        description="What all runs have in common: keys of `msplora train`, by sections."
    )
    tasks: dict[str, dict[str, Any]] = Field(
        min_length=1, description="Name -> the keys that make it: its data, above all."
    )
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="Name -> the keys that make it: `method`, `adapter` … With `budget` its rank "
        "is the smallest that does not train fewer numbers: a number, the name of another method "
        "whose size it is to have, or a list of these, each a method of its own.",
    )
    baseline: str | None = Field(
        None, description="The method that the others are compared with; the first if unset."
    )
    learning_rates: Rates = Field(
        description="The peak rates to choose from, tried in this order: the likeliest first, for "
        "the later ones are rejected by the earlier. A method may have `learning_rates` of its own."
    )
    choose: ChooseSettings = Field(
        default_factory=ChooseSettings,  # pyright: ignore[reportArgumentType]
        description="What the rate of each method is [chosen on](#choosing-the-rate).",
    )
    seeds: list[int] = Field(
        [0, 1, 2],
        min_length=1,
        description="Every method runs on every task with each of these, at its chosen rate.",
    )
    reject: RejectSettings | None = Field(
        None, description="When a rate is [given up early](#rejecting-a-rate); never if unset."
    )
    budget_within: float = Field(
        0.25, ge=0, description="How far a size may be above its `budget`, as a share of it."
    )
