"""What the base says of adapters' updates: their relative norms, and intruder dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .base import Base
from .intruders import intruders, left_vectors
from .results import KindResult, Measures, SiteResult
from .stored import StoredAdapter, StoredKind, StoredSite
from .too_large import products_that_are_numbers

Read = Sequence[tuple[StoredAdapter, Base | None]]
"""Adapters, each with its base where that is looked at."""
Weight = tuple[tuple[str, str | None], str, tuple[int, int]]
"""Of which base, its path and its shape."""
Weights = Mapping[Weight, list[tuple[int, int, int]]]
"""Who adapts a weight: the number of the adapter, its kind and its site."""


def weights_of(read: Read) -> Weights:
    """The weights that the base's files hold; not what is stored otherwise, as several in one."""
    found: dict[Weight, list[tuple[int, int, int]]] = {}
    for number, (adapter, base) in enumerate(read):
        for of_kind, kind in enumerate(adapter.kinds):
            for depth, site in enumerate(kind.sites):
                if base is not None and base.has(site.key, kind.matrix):
                    places = found.setdefault((base.weights, site.key, kind.matrix), [])
                    places.append((number, of_kind, depth))
    return found


def with_base(
    results: Sequence[tuple[KindResult, ...]],
    read: Read,
    weights: Weights,
    intruder_vectors: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[KindResult, ...]]:
    """Fill in what needs the base's weights.

    One of them is held at a time, and decomposed once for all who adapt it.

    Args:
        results: every adapter's kinds.
        read: the adapters.
        weights: which of their weights the base has.
        intruder_vectors: how many leading singular vectors to compare.
        report: told how many weights are done, and of how many.
    """
    filled: dict[tuple[int, int, int], SiteResult] = {}
    for done, ((_, key, shape), places) in enumerate(weights.items(), start=1):
        base = read[places[0][0]][1]
        weight_OI = None if base is None else base.weight(key, shape)
        assert weight_OI is not None  # as `weights_of` found
        before_OK = left_vectors(weight_OI) if intruder_vectors else None
        norm = float(torch.linalg.vector_norm(weight_OI, dtype=torch.float64))
        for number, of_kind, depth in places:
            adapter, result = read[number][0], results[number][of_kind].sites[depth]
            kind = adapter.kinds[of_kind]
            its = _beside(result, norm)
            if before_OK is not None:
                a_RI, b_OR = _factors(kind, kind.sites[depth])
                with products_that_are_numbers(adapter.path, kind.name):
                    found = intruders(weight_OI, before_OK, a_RI, b_OR, intruder_vectors)
                its = replace(its, intruders=found)
            filled[number, of_kind, depth] = its
        report(done, len(weights))
    return [
        tuple(
            replace(
                kind,
                sites=tuple(
                    filled.get((number, of_kind, depth), site)
                    for depth, site in enumerate(kind.sites)
                ),
            )
            for of_kind, kind in enumerate(kinds)
        )
        for number, kinds in enumerate(results)
    ]


def _factors(kind: StoredKind, site: StoredSite) -> tuple[Tensor, Tensor]:
    """A and B of all levels, with their scales."""
    pairs = [kind.pairs[place] for place in site.pairs]
    factors = [(*pair.read(), pair.scale) for pair in pairs]
    a_RI = torch.cat([a_RI.double() for a_RI, _, _ in factors])
    b_OR = torch.cat([b_OR.double() * scale for _, b_OR, scale in factors], dim=1)
    return a_RI, b_OR


def _beside(site: SiteResult, norm: float) -> SiteResult:
    """With its norms in parts of the weight's."""

    def of(update: Measures) -> Measures:
        return replace(update, relative_norm=update.norm / norm if norm else None)

    levels = {level: of(its) for level, its in site.levels.items()}
    return replace(site, update=of(site.update), levels=levels, base_norm=norm)
