"""Many experts of one weight on a page: a few are drawn, and all are counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from typing import NamedTuple, TypeVar

from .results import AdapterResult, KindComparison, KindResult, mean
from .stored import StoredKind

MANY = 6
"""Of so many experts of one weight each is drawn; of more, three."""
_PARAMETER = re.compile(r"(?P<weight>.*)\[expert (?P<number>\d+)\]")
_MODULE = re.compile(r"(?P<list>(?:.*\.)?experts)\.(?P<number>\d+)\.(?P<place>.+)")

Its = TypeVar("Its", KindResult, KindComparison, StoredKind)


class Weight(NamedTuple):
    """A place inside the blocks: one kind, or one for each of its experts."""

    name: str
    kinds: tuple[KindResult, ...]

    @property
    def many(self) -> bool:
        """Whether a few of its experts stand for all."""
        return len(self.kinds) > MANY


def weights(adapter: AdapterResult) -> list[Weight]:
    """The kinds of an adapter, those of the experts of one weight together."""
    found = _by_weight(adapter.kinds, lambda kind: kind.name)
    return [Weight(name, tuple(kinds)) for name, kinds in found.items()]


def drawn(adapter: AdapterResult, adapters: Sequence[AdapterResult]) -> list[KindResult]:
    """The kinds to draw: of many experts those with the smallest, median and largest update.

    Those that all adapters have come first, in one order, so that they stand beside each other.
    """
    first, found = (_few(its.kinds, lambda kind: kind.name, norm) for its in (adapters[0], adapter))
    common = [kind.name for kind in first if all(named(its, kind.name) for its in adapters)]
    places = {name: place for place, name in enumerate(common)}
    return sorted(found, key=lambda kind: places.get(kind.name, len(places)))


def in_order(kinds: Iterable[StoredKind]) -> tuple[StoredKind, ...]:
    """The experts of one weight after each other, by their numbers."""
    return tuple(kind for its in _by_weight(kinds, lambda kind: kind.name).values() for kind in its)


def named(adapter: AdapterResult, name: str) -> list[KindResult]:
    """The kind of that name, if the adapter has it."""
    return [kind for kind in adapter.kinds if kind.name == name]


def compared(kinds: Sequence[KindComparison]) -> list[KindComparison]:
    """The comparisons to draw: of many experts the least alike, the median and the most alike."""
    return _few(kinds, lambda kind: kind.kind, lambda kind: mean(kind.cosine) or 0.0)


def norm(kind: KindResult) -> float:
    """The root mean square of the norms of a kind's updates."""
    return sqrt(sum(site.update.norm**2 for site in kind.sites) / len(kind.sites))


def _few(
    kinds: Sequence[Its], name: Callable[[Its], str], measure: Callable[[Its], float]
) -> list[Its]:
    found: list[Its] = []
    for its in _by_weight(kinds, name).values():
        if len(its) > MANY:
            places = sorted(range(len(its)), key=lambda place, its=its: measure(its[place]))
            its = [its[place] for place in sorted({places[0], places[len(its) // 2], places[-1]})]
        found += its
    return found


def _by_weight(kinds: Iterable[Its], name: Callable[[Its], str]) -> dict[str, list[Its]]:
    """In the order of the experts' numbers, which names in a file need not be in."""
    found: dict[str, list[tuple[int, Its]]] = {}
    for kind in kinds:
        weight, number = _expert(name(kind))
        found.setdefault(weight, []).append((number, kind))
    return {
        weight: [kind for _, kind in sorted(its, key=lambda its: its[0])]
        for weight, its in found.items()
    }


def is_of_a_parameter(name: str) -> bool:
    """Whether a kind is of one of the experts that are parts of a parameter."""
    return _PARAMETER.fullmatch(name) is not None


def _expert(name: str) -> tuple[str, int]:
    """The weight that a kind's name is of, and the number of its expert.

    Experts are parts of one parameter, or modules; what is none is a weight of its own.
    """
    if found := _PARAMETER.fullmatch(name):
        return found["weight"], int(found["number"])
    if found := _MODULE.fullmatch(name):
        return f"{found['list']}.{found['place']}", int(found["number"])
    return name, 0
