"""Methods of one size beside each other, which is what a `budget` is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .bake_off import Outcome
from .reading import BakeOff
from .sizes import Prepared
from .statistics import Paired, holm, pair, sign_of_all, values_of


@dataclass(frozen=True)
class Beside:
    """An entrant, and the one of its size that it is compared with."""

    name: str
    other: str
    paired: Paired | None
    """`adjusted` after Holm, for all that are to be compared; None without a pair on some task."""


def at_equal_size(outcome: Outcome) -> list[Beside]:
    """The entrants of each size that a budget asks for, but one that the others stand beside.

    That one is the baseline if it is among them, else the first that is of the baseline's method,
    else the first. Entrants of a size without a budget's help are among them where they have it
    exactly.
    """
    prepared, values, sign = outcome.prepared, values_of(outcome), sign_of_all(outcome)
    tasks = list(prepared.bake_off.settings.tasks)
    beside: dict[str, str] = {}
    found: dict[str, Paired] = {}
    for names in _of_one_size(prepared):
        standard = _standard(names, prepared.bake_off)
        for name in names:
            if name == standard:
                continue
            beside[name] = standard
            if paired := pair(name, standard, values, tasks, sign):
                found[name] = paired
    adjusted = holm(found, len(beside))
    return [Beside(name, other, adjusted.get(name)) for name, other in beside.items()]


def _of_one_size(prepared: Prepared) -> list[list[str]]:
    """The names of the entrants of each size that a budget asks for."""
    entrants, sizes = prepared.bake_off.entrants, prepared.sizes
    asked = {
        name: sizes[its.budget] if isinstance(its.budget, str) else its.budget or sizes[name]
        for name, its in entrants.items()
    }
    wanted = dict.fromkeys(asked[name] for name, its in entrants.items() if its.budget is not None)
    return [[name for name, its in asked.items() if its == size] for size in wanted]


def _standard(names: Sequence[str], bake_off: BakeOff) -> str:
    if bake_off.baseline in names:
        return bake_off.baseline
    kind = bake_off.method_of(bake_off.baseline)
    return next((its for its in names if bake_off.method_of(its) == kind), names[0])
