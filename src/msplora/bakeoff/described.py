"""What was trained on what, in words: a report is read where its file is not at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msplora.sweep.naming import shown
from msplora.train.methods import lora_rank_and_alpha, pyramid_of
from msplora.train.same_settings import flat
from msplora.train.settings import Settings
from msplora.train.settings_methods import LORAS

from .folder import portable
from .reading import BakeOff, Entrant, Run, rounded

_ALWAYS = (
    "model", "task", "dtype", "data.max_length", "training.epochs", "training.batch_size",
    "training.gradient_accumulation", "training.optimizer", "training.scheduler",
    "training.warmup_ratio",
)  # fmt: skip
"""Keys that are told where the file leaves them at their defaults too."""


def described(bake_off: BakeOff) -> list[str]:
    """What all runs have in common, what each task has of its own, and what each method is: a line
    each, in the keys of `msplora train`.
    """
    by_task = {task: _of_task(bake_off, task) for task in bake_off.settings.tasks}
    first, *others = by_task.values()
    common = {
        key: value
        for key, value in first.items()
        if all(key in its and its[key] == value for its in others)
    }
    lines = [f"All runs, where nothing else is said: {_listed(common)}."]
    for task, its in by_task.items():
        own = {key: value for key, value in its.items() if key not in common}
        if own:
            lines.append(f"Task {task}: {_listed(own)}.")
    return lines + [_of_method(bake_off, its) for its in bake_off.entrants.values()]


def _of_task(bake_off: BakeOff, task: str) -> dict[str, Any]:
    """What is set for all methods on a task, and what is worth telling where it is not."""
    settings, method = _settings_of(bake_off, bake_off.baseline, task), bake_off.baseline
    resolved = flat(settings.model_dump(mode="json"))
    always = [*_ALWAYS]
    data = settings.data
    if not (data.glue or data.validation or data.validation_split):
        always.append("data.validation_fraction")
    of_the_method = flat(bake_off.entrants[method].content)
    told = {key: resolved[key] for key in always if key not in of_the_method}
    given = flat(bake_off.settings.base) | flat(bake_off.settings.tasks[task])
    return portable(told | given)


def _of_method(bake_off: BakeOff, entrant: Entrant) -> str:
    settings = _settings_of(bake_off, entrant.name, next(iter(bake_off.settings.tasks)))
    given = portable({"method": settings.method} | flat(entrant.content))
    said = f"Method {entrant.name}: {_listed(given)}{_shape(settings)}"
    if entrant.rates != tuple(map(rounded, bake_off.settings.learning_rates)):
        said += f"; learning rates of its own: {', '.join(f'{its:g}' for its in entrant.rates)}"
    return f"{said}."


def _shape(settings: Settings) -> str:
    """The ranks and alphas that a pyramid, or a LoRA, has by its keys and by the defaults."""
    if settings.init_from:
        return ""  # they are those of what it starts from
    if settings.method == "msplora":
        levels = "; ".join(
            f"{its.name} of rank {its.rank}, alpha {its.alpha:g}, {_shared(its.groups)}"
            for its in pyramid_of(settings).pyramid
        )
        return f": {levels}"
    if settings.method in LORAS:
        rank, alpha = lora_rank_and_alpha(settings.adapter)
        return f": rank {rank}, alpha {alpha:g}"
    return ""


def _shared(groups: int) -> str:
    return {0: "each layer its own", 1: "one for all layers"}.get(groups, f"in {groups} groups")


def _settings_of(bake_off: BakeOff, name: str, task: str) -> Settings:
    rate, seed = bake_off.entrants[name].rates[0], bake_off.settings.seeds[0]
    return bake_off.settings_of(Run(name, task, rate, seed))


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {shown(value)}" for key, value in values.items())
