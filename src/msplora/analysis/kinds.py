"""One kind of an adapter: its levels' updates, how alike its layers are, how the levels overlap."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .measures import (
    Updates,
    cosines,
    decompose,
    effective_ranks,
    explained_by_a_pair,
    explained_by_a_space,
    inside,
    joint_span,
    layer_cosines,
    mean_principal_cosines,
    numerical_ranks,
    overlaps,
    spans,
    stable_ranks,
    triangular,
)
from .results import (
    KindResult,
    LevelOverlap,
    Matrix,
    Measures,
    Numbers,
    Shared,
    Similarity,
    SiteResult,
    matrix,
    numbers,
)
from .stored import StoredKind, StoredPair


class Coordinates:
    """Pairs of one shape in the coordinates of their joint QR decompositions."""

    def __init__(self, pairs: Sequence[StoredPair]) -> None:
        ranks = [pair.rank for pair in pairs]
        self._a_PP = triangular(lambda p: pairs[p].read()[0], ranks, pairs[0].in_features)
        self._b_PP = triangular(lambda p: pairs[p].read()[1].mT, ranks, pairs[0].out_features)
        self._scales = [pair.scale for pair in pairs]
        ends = accumulate(ranks)
        self._columns = [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]

    def updates(self, sums: Sequence[Sequence[int]]) -> Updates:
        """For each entry the sum of the updates ``s B A`` of the pairs that it numbers."""
        sides = (
            (
                torch.cat([self._b_PP[:, self._columns[p]] * self._scales[p] for p in of], dim=1),
                torch.cat([self._a_PP[:, self._columns[p]] for p in of], dim=1),
            )
            for of in sums
        )
        ranks = [sum(its.stop - its.start for its in (self._columns[p] for p in of)) for of in sums]
        return decompose(sides, len(sums), max(ranks))


class KindUpdates:
    """The updates of a kind's layers, level by level and in sum."""

    def __init__(self, kind: StoredKind, levels: tuple[str, ...]) -> None:
        self.kind = kind
        self.level_names = levels
        self._coordinates = Coordinates(kind.pairs)
        self.levels = [
            self._coordinates.updates([[site.pairs[place]] for site in kind.sites])
            for place in range(len(levels))
        ]
        """Of each level, of all layers."""

    def total(self) -> Updates:
        """Of all layers, the sum of the levels'; each call computes it."""
        if len(self.levels) == 1:
            return self.levels[0]
        return self._coordinates.updates([site.pairs for site in self.kind.sites])


def analyse_kind(kind: StoredKind, levels: tuple[str, ...]) -> KindResult:
    """Everything that the factors of one kind say."""
    updates = KindUpdates(kind, levels)
    of_levels, overlaps_of_levels = level_measures(updates), decoupling(updates)
    total = updates.total()
    del updates  # each is as large as the kind's factors
    several = len(kind.sites) > 1 and bool((total.values[:, 0] > 0).any())
    return KindResult(
        kind.name,
        kind.out_features,
        kind.in_features,
        _sites(kind, total, levels, of_levels),
        _similarity(kind, total) if several else None,
        _shared(total) if several else None,
        overlaps_of_levels,
    )


def level_measures(updates: KindUpdates) -> list[list[Measures]]:
    """For every site, for every level."""
    kind = updates.kind
    norms = torch.stack([level.values.norm(dim=-1) for level in updates.levels], dim=-1)  # (L, T)
    squares = norms.square()
    shares = squares / squares.sum(-1, keepdim=True)  # not a number where all are zero
    by_level = [
        _measures(
            kind, level, shares[:, place], [site.pairs[place : place + 1] for site in kind.sites]
        )
        for place, level in enumerate(updates.levels)
    ]
    return [list(its) for its in zip(*by_level, strict=True)]


def _measures(
    kind: StoredKind, of: Updates, shares: Tensor, pairs: Sequence[tuple[int, ...]]
) -> list[Measures]:
    """Of each layer's update, which is the sum of its `pairs`."""
    # A layer of lower rank than others has zeros at the end, which are none of its values.
    ranks = [sum(kind.pairs[its].rank for its in its_pairs) for its_pairs in pairs]
    values = [its[:rank] for its, rank in zip(of.values.tolist(), ranks, strict=True)]
    columns = zip(
        of.values.norm(dim=-1).tolist(),
        numbers(shares),
        effective_ranks(of.values).tolist(),
        stable_ranks(of.values).tolist(),
        _ranks(kind, of).tolist(),
        map(tuple, values),
        strict=True,
    )
    return [Measures(*its) for its in columns]


def _ranks(kind: StoredKind, updates: Updates) -> Tensor:
    """Numerical ranks, (L,)."""
    return numerical_ranks(updates.values, kind.out_features, kind.in_features)


def _sites(
    kind: StoredKind,
    total: Updates,
    names: tuple[str, ...],
    of_levels: Sequence[Sequence[Measures]],
) -> tuple[SiteResult, ...]:
    whole = torch.ones(len(kind.sites), dtype=torch.float64)
    totals = _measures(kind, total, whole, [site.pairs for site in kind.sites])
    return tuple(
        SiteResult(site.key, site.layer, its, dict(zip(names, levels, strict=True)))
        for site, its, levels in zip(kind.sites, totals, of_levels, strict=True)
    )


def _similarity(kind: StoredKind, total: Updates) -> Similarity:
    ranks = _ranks(kind, total)
    columns, principal_columns = _between(spans(total.left, ranks))
    rows, principal_rows = _between(spans(total.right, ranks))
    dimension = float(ranks.double().mean())
    return Similarity(
        matrix(cosines(total, total)),
        columns,
        rows,
        principal_columns,
        principal_rows,
        dimension / kind.out_features,
        dimension / kind.in_features,
    )


def _between(spans_LPK: Tensor) -> tuple[Matrix, Numbers]:
    """Of one side at a time: its spans are as large as the factors."""
    return matrix(overlaps(spans_LPK, spans_LPK)), numbers(mean_principal_cosines(spans_LPK))


def _shared(total: Updates) -> Shared:
    left, values, right = total
    ranks = values.shape[-1]  # what each layer has now
    return Shared(
        numbers(explained_by_a_space(left, values)[:ranks]),
        numbers(explained_by_a_space(right, values)[:ranks]),
        numbers(explained_by_a_pair(total)[:ranks]),
    )


def decoupling(updates: KindUpdates) -> tuple[LevelOverlap, ...]:
    """Each level in the span of each other, and in that of all before it where they are several."""
    names = updates.level_names
    found = []
    for place, level in enumerate(names):
        others = [(other,) for other in range(len(names)) if other != place]
        before = tuple(range(place))
        for of in [*others, *([before] if place > 1 else [])]:
            found.append(_overlap(updates, place, of, level))
    return tuple(found)


def coarser(updates: KindUpdates) -> LevelOverlap | None:
    """The last level in the span of all before it; None where there is one level."""
    count = len(updates.levels)
    if count < 2:
        return None
    return _overlap(updates, count - 1, tuple(range(count - 1)), updates.level_names[-1])


def _overlap(updates: KindUpdates, place: int, of: tuple[int, ...], level: str) -> LevelOverlap:
    level_updates, others = updates.levels[place], [updates.levels[its] for its in of]
    ranks = [_ranks(updates.kind, its) for its in others]
    columns, dimension_of_columns = _inside_all(
        level_updates.left, level_updates.values, [its.left for its in others], ranks
    )
    rows, dimension_of_rows = _inside_all(
        level_updates.right, level_updates.values, [its.right for its in others], ranks
    )
    cosine: Tensor = torch.empty(0)
    if len(of) == 1:
        cosine = layer_cosines(level_updates, others[0])
    return LevelOverlap(
        level,
        tuple(updates.level_names[its] for its in of),
        columns,
        rows,
        dimension_of_columns / updates.kind.out_features,
        dimension_of_rows / updates.kind.in_features,
        numbers(cosine),
    )


def _inside_all(
    basis_LPK: Tensor, values_LK: Tensor, others: Sequence[Tensor], ranks: Sequence[Tensor]
) -> tuple[Numbers, float]:
    """The share of each layer's update within the others' span, and its dimension on average."""
    shares, dimension = [], 0
    for layer, (basis_PK, values_K) in enumerate(zip(basis_LPK, values_LK, strict=True)):
        span_PM = joint_span(
            [its[layer, :, : int(rank[layer])] for its, rank in zip(others, ranks, strict=True)]
        )
        shares.append(inside(basis_PK, values_K, span_PM))
        dimension += span_PM.shape[1]
    return numbers(torch.stack(shares)), dimension / len(shares)
