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
        self._a_PP = triangular([pair.a_RI for pair in pairs])
        self._b_PP = triangular([pair.b_OR.mT for pair in pairs])
        self._scales = [pair.scale for pair in pairs]
        ends = accumulate(len(pair.a_RI) for pair in pairs)
        self._columns = [
            slice(end - len(pair.a_RI), end) for end, pair in zip(ends, pairs, strict=True)
        ]

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
        coordinates = Coordinates(kind.pairs)
        self.levels = [
            coordinates.updates([[site.pairs[place]] for site in kind.sites])
            for place in range(len(levels))
        ]
        """Of each level, of all layers."""
        self.total = self.levels[0]
        if len(levels) > 1:
            self.total = coordinates.updates([site.pairs for site in kind.sites])

    def ranks(self, updates: Updates) -> Tensor:
        """(L,)"""
        return numerical_ranks(updates.values, self.kind.out_features, self.kind.in_features)

    def column_spans(self, updates: Updates) -> Tensor:
        """The column space of each layer's update: (L, P, K)."""
        return spans(updates.left, self.ranks(updates))

    def row_spans(self, updates: Updates) -> Tensor:
        """The row space of each layer's update: (L, P, K)."""
        return spans(updates.right, self.ranks(updates))


def analyse_kind(updates: KindUpdates) -> KindResult:
    """Everything that the factors of one kind say."""
    kind = updates.kind
    several = len(kind.sites) > 1 and bool((updates.total.values[:, 0] > 0).any())
    return KindResult(
        kind.name,
        kind.out_features,
        kind.in_features,
        _sites(updates),
        _similarity(updates) if several else None,
        _shared(updates) if several else None,
        decoupling(updates),
    )


def level_measures(updates: KindUpdates) -> list[list[Measures]]:
    """For every site, for every level."""
    sites = updates.kind.sites
    norms = torch.stack([level.values.norm(dim=-1) for level in updates.levels], dim=-1)  # (L, T)
    squares = norms.square()
    shares = squares / squares.sum(-1, keepdim=True)  # not a number where all are zero
    by_level = [
        _measures(
            updates, level, shares[:, place], [site.pairs[place : place + 1] for site in sites]
        )
        for place, level in enumerate(updates.levels)
    ]
    return [list(its) for its in zip(*by_level, strict=True)]


def _measures(
    updates: KindUpdates, of: Updates, shares: Tensor, pairs: Sequence[tuple[int, ...]]
) -> list[Measures]:
    """Of each layer's update, which is the sum of its `pairs`."""
    # A layer of lower rank than others has zeros at the end, which are none of its values.
    ranks = [sum(len(updates.kind.pairs[its].a_RI) for its in its_pairs) for its_pairs in pairs]
    values = [its[:rank] for its, rank in zip(of.values.tolist(), ranks, strict=True)]
    columns = zip(
        of.values.norm(dim=-1).tolist(),
        numbers(shares),
        effective_ranks(of.values).tolist(),
        stable_ranks(of.values).tolist(),
        updates.ranks(of).tolist(),
        map(tuple, values),
        strict=True,
    )
    return [Measures(*its) for its in columns]


def _sites(updates: KindUpdates) -> tuple[SiteResult, ...]:
    sites, names = updates.kind.sites, updates.level_names
    whole = torch.ones(len(sites), dtype=torch.float64)
    totals = _measures(updates, updates.total, whole, [site.pairs for site in sites])
    return tuple(
        SiteResult(site.key, site.layer, total, dict(zip(names, levels, strict=True)))
        for site, total, levels in zip(sites, totals, level_measures(updates), strict=True)
    )


def _similarity(updates: KindUpdates) -> Similarity:
    columns, principal_columns = _between(updates.column_spans(updates.total))
    rows, principal_rows = _between(updates.row_spans(updates.total))
    dimension = float(updates.ranks(updates.total).double().mean())
    return Similarity(
        matrix(cosines(updates.total, updates.total)),
        columns,
        rows,
        principal_columns,
        principal_rows,
        dimension / updates.kind.out_features,
        dimension / updates.kind.in_features,
    )


def _between(spans_LPK: Tensor) -> tuple[Matrix, Numbers]:
    """Of one side at a time: its spans are as large as the factors."""
    return matrix(overlaps(spans_LPK, spans_LPK)), numbers(mean_principal_cosines(spans_LPK))


def _shared(updates: KindUpdates) -> Shared:
    left, values, right = updates.total
    ranks = values.shape[-1]  # what each layer has now
    return Shared(
        numbers(explained_by_a_space(left, values)[:ranks]),
        numbers(explained_by_a_space(right, values)[:ranks]),
        numbers(explained_by_a_pair(updates.total)[:ranks]),
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
    left, values, right = updates.levels[place]
    columns = joint_span([updates.column_spans(updates.levels[its]) for its in of])
    rows = joint_span([updates.row_spans(updates.levels[its]) for its in of])
    cosine: Tensor = torch.empty(0)
    if len(of) == 1:
        cosine = cosines(updates.levels[place], updates.levels[of[0]]).diagonal()
    return LevelOverlap(
        level,
        tuple(updates.level_names[its] for its in of),
        numbers(inside(left, values, columns)),
        numbers(inside(right, values, rows)),
        _dimension(columns) / updates.kind.out_features,
        _dimension(rows) / updates.kind.in_features,
        numbers(cosine),
    )


def _dimension(span_LPK: Tensor) -> float:
    """Of the spaces, on average over the layers."""
    return float(span_LPK.square().sum()) / len(span_LPK)
