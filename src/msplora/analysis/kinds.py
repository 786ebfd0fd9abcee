"""One kind of an adapter: its levels' updates, how alike its layers are, how the levels overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from msplora.spectrum import is_nothing

from .chance import explained_of_turned, random_principal_cosines
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
    mean_larger,
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
    Number,
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
        for its in self._columns:
            if is_nothing(self._a_PP[:, its].mT, self._b_PP[:, its]):
                self._b_PP[:, its] = 0  # else noise would be measured

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


@dataclass(frozen=True)
class LevelUpdates:
    """The updates of one level: each pair's once, however many layers borrow it."""

    pairs: Updates
    of_layer: list[int]
    """Which of them each layer has."""

    def values(self) -> Tensor:
        """The singular values of all layers, (L, K)."""
        return self.pairs.values[self.of_layer]

    def of_layers(self) -> Updates:
        """As if each layer had its own."""
        if len(self.pairs.values) == len(self.of_layer):  # then they are in the layers' order
            return self.pairs
        return Updates(*(its[self.of_layer] for its in self.pairs))

    def only(self, pair: int) -> Updates:
        """One pair's, as a batch of one."""
        return Updates(*(its[pair : pair + 1] for its in self.pairs))


class KindUpdates:
    """The updates of a kind's layers, level by level and in sum."""

    def __init__(self, kind: StoredKind, levels: tuple[str, ...]) -> None:
        self.kind = kind
        self.level_names = levels
        self._coordinates = Coordinates(kind.pairs)
        self.levels = [self._level(place) for place in range(len(levels))]

    def _level(self, place: int) -> LevelUpdates:
        borrowed = [site.pairs[place] for site in self.kind.sites]
        found = {pair: place for place, pair in enumerate(dict.fromkeys(borrowed))}
        updates = self._coordinates.updates([[pair] for pair in found])
        return LevelUpdates(updates, [found[pair] for pair in borrowed])

    def total(self) -> Updates:
        """Of all layers, the sum of the levels'; each call computes it."""
        if len(self.levels) == 1:
            return self.levels[0].of_layers()
        return self._coordinates.updates([site.pairs for site in self.kind.sites])


def analyse_kind(kind: StoredKind, levels: tuple[str, ...]) -> KindResult:
    """Everything that the factors of one kind say."""
    updates = KindUpdates(kind, levels)
    of_levels, overlaps_of_levels = level_measures(updates), decoupling(updates)
    total = updates.total()
    del updates  # each is as large as the kind's factors
    sites = _sites(kind, total, levels, of_levels)
    several = len(kind.sites) > 1 and bool((total.values[:, 0] > 0).any())
    similarity = _similarity(kind, total) if several else None
    found, values = _explained(total) if several else (), total.values
    del total
    return KindResult(
        kind.name,
        kind.out_features,
        kind.in_features,
        sites,
        similarity,
        Shared(*found, *_explained_by_chance(kind, values)) if found else None,
        overlaps_of_levels,
    )


def level_measures(updates: KindUpdates) -> list[list[Measures]]:
    """For every site, for every level."""
    kind = updates.kind
    values = [level.values() for level in updates.levels]
    squares = torch.stack([its.square().sum(-1) for its in values], dim=-1)  # (L, T)
    shares = squares / squares.sum(-1, keepdim=True)  # not a number where all are zero
    by_level = [
        _measures(
            kind, its, shares[:, place], [site.pairs[place : place + 1] for site in kind.sites]
        )
        for place, its in enumerate(values)
    ]
    return [list(its) for its in zip(*by_level, strict=True)]


def _measures(
    kind: StoredKind, values_LK: Tensor, shares: Tensor, pairs: Sequence[tuple[int, ...]]
) -> list[Measures]:
    """Of each layer's update, which is the sum of its `pairs`."""
    # A layer of lower rank than others has zeros at the end, which are none of its values.
    ranks = [sum(kind.pairs[its].rank for its in its_pairs) for its_pairs in pairs]
    values = [its[:rank] for its, rank in zip(values_LK.tolist(), ranks, strict=True)]
    columns = zip(
        values_LK.norm(dim=-1).tolist(),
        numbers(shares),
        effective_ranks(values_LK).tolist(),
        stable_ranks(values_LK).tolist(),
        _ranks(kind, values_LK).tolist(),
        map(tuple, values),
        strict=True,
    )
    return [Measures(*its) for its in columns]


def _ranks(kind: StoredKind, values_LK: Tensor) -> Tensor:
    """Numerical ranks, (L,)."""
    return numerical_ranks(values_LK, kind.out_features, kind.in_features)


def _sites(
    kind: StoredKind,
    total: Updates,
    names: tuple[str, ...],
    of_levels: Sequence[Sequence[Measures]],
) -> tuple[SiteResult, ...]:
    whole = torch.ones(len(kind.sites), dtype=torch.float64)
    totals = _measures(kind, total.values, whole, [site.pairs for site in kind.sites])
    return tuple(
        SiteResult(site.key, site.layer, its, dict(zip(names, levels, strict=True)))
        for site, its, levels in zip(kind.sites, totals, of_levels, strict=True)
    )


def _similarity(kind: StoredKind, total: Updates) -> Similarity:
    ranks = _ranks(kind, total.values)
    columns, principal_columns = _between(spans(total.left, ranks))
    rows, principal_rows = _between(spans(total.right, ranks))
    # Of different layers: beside itself a layer has no less than all.
    one, other = torch.triu_indices(len(ranks), len(ranks), offset=1)
    larger = mean_larger(ranks[one], ranks[other])
    return Similarity(
        matrix(cosines(total, total)),
        columns,
        rows,
        principal_columns,
        principal_rows,
        *_shares_of(kind, larger, larger),
        numbers(random_principal_cosines(ranks, kind.out_features)),
        numbers(random_principal_cosines(ranks, kind.in_features)),
    )


def _shares_of(kind: StoredKind, columns: Tensor, rows: Tensor) -> tuple[Number, Number]:
    """Dimensions of spaces of columns and of rows, in parts of all there are."""
    of_columns, of_rows = numbers(
        torch.stack([columns / kind.out_features, rows / kind.in_features])
    )
    return of_columns, of_rows


def _between(spans_LPK: Tensor) -> tuple[Matrix, Numbers]:
    """Of one side at a time: its spans are as large as the factors."""
    return matrix(overlaps(spans_LPK, spans_LPK)), numbers(mean_principal_cosines(spans_LPK))


def _explained(total: Updates) -> tuple[Numbers, Numbers, Numbers]:
    """By one space of columns, of rows, and by one pair."""
    left, values, right = total
    ranks = values.shape[-1]  # what each layer has now
    return (
        numbers(explained_by_a_space(left, values)[:ranks]),
        numbers(explained_by_a_space(right, values)[:ranks]),
        numbers(explained_by_a_pair(total)[:ranks]),
    )


def _explained_by_chance(kind: StoredKind, values_LK: Tensor) -> tuple[Numbers, Numbers, Numbers]:
    columns, rows, pair = explained_of_turned(values_LK, kind.out_features, kind.in_features)
    return numbers(columns), numbers(rows), numbers(pair)


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
    kind, levels = updates.kind, [updates.levels[its] for its in (place, *of)]
    # Pairs that are shared meet in several layers, and are compared once.
    met = list(zip(*(its.of_layer for its in levels), strict=True))
    found = {
        pairs: _meeting(kind, *(its.only(pair) for its, pair in zip(levels, pairs, strict=True)))
        for pairs in dict.fromkeys(met)
    }
    columns, rows, cosine, *dimensions = torch.stack([found[pairs] for pairs in met]).unbind(-1)
    of_columns, of_rows = (its[~columns.isnan()].mean() for its in dimensions)
    return LevelOverlap(
        level,
        tuple(updates.level_names[its] for its in of),
        numbers(columns),
        numbers(rows),
        *_shares_of(kind, of_columns, of_rows),
        numbers(cosine) if len(of) == 1 else (),
    )


def _meeting(kind: StoredKind, update: Updates, *others: Updates) -> Tensor:
    """An update beside others of the same layer, each a batch of one.

    Returns:
        (5,): the shares of its square within the others' columns and rows, its cosine with the
        first, and the dimensions that the others span in columns and in rows.
    """
    ranks = [int(_ranks(kind, its.values)) for its in others]
    shares, dimensions = [], []
    for basis_1PK, sides in (
        (update.left, [its.left for its in others]),
        (update.right, [its.right for its in others]),
    ):
        bases = [its[0, :, :rank] for its, rank in zip(sides, ranks, strict=True)]
        span_PM = joint_span(bases)
        shares.append(inside(basis_1PK[0], update.values[0], span_PM))
        dimensions.append(torch.tensor(float(span_PM.shape[1]), dtype=torch.float64))
    return torch.stack([*shares, layer_cosines(update, others[0])[0], *dimensions])
