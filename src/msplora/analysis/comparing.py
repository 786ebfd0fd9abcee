"""Two adapters beside each other: their updates of the weights that both adapt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from msplora.page.environment import short
from msplora.same_source import same_source

from .experts import is_of_a_parameter
from .kinds import Coordinates
from .measures import layer_cosines, mean_larger, numerical_ranks, overlaps, spans
from .results import Comparison, KindComparison, numbers
from .stored import StoredAdapter, StoredKind, StoredSite


def compare(first: StoredAdapter, second: StoredAdapter, names: tuple[str, str]) -> Comparison:
    """Layer by layer, kinds of the same name and shape; what is left out is noted."""
    found: list[KindComparison] = []
    out = _LeftOut()
    unnamed = any(kind.unnamed for kind in (*first.kinds, *second.kinds))
    same = first.fingerprint is not None and first.fingerprint == second.fingerprint
    for kind in first.kinds:
        other = _counterpart(kind, first, second)
        its = None if other is None else _compare(kind, other, same)
        if other is None:
            out.without_counterpart(kind, unnamed)
        elif its is None:
            (out.uncertain if kind.counted or other.counted else out.apart).append(kind.name)
        else:
            found.append(its)
            if not len(its.layers) == len(kind.sites) == len(other.sites):
                out.layers.append(kind.name)
    for kind in second.kinds:
        if _counterpart(kind, second, first) is None:
            out.without_counterpart(kind, unnamed)
    notes = [*_bases(first, second, names)]
    if found or out.uncertain or out.apart or out.unnamed:
        notes += out.notes()
    else:
        notes.append("They adapt no weight of the same place and shape.")
    return Comparison(*names, tuple(found), tuple(notes))


def _bases(first: StoredAdapter, second: StoredAdapter, names: tuple[str, str]) -> list[str]:
    """That the two were not trained on one base, as far as they name theirs."""
    ours, theirs = first.base, second.base
    if not ours or not theirs or same_source(ours, theirs):
        return []
    return [
        f"They name different bases: {names[0]} names {short(ours)}, and {names[1]} names "
        f"{short(theirs)}. Unless these are one model in two places, likeness of their updates "
        f"says little: each is relative to weights of its own."
    ]


@dataclass
class _LeftOut:
    """The names of kinds that are not compared, or not all of whose layers are, by the reason."""

    uncertain: list[str] = field(default_factory=list[str])
    apart: list[str] = field(default_factory=list[str])
    unnamed: list[str] = field(default_factory=list[str])
    alone: list[str] = field(default_factory=list[str])
    layers: list[str] = field(default_factory=list[str])

    def without_counterpart(self, kind: StoredKind, unnamed: bool) -> None:
        """Note a kind that one adapter has, or has in another shape.

        Args:
            kind: the adapter's.
            unnamed: whether one of the two has parameters that its file does not name: those of
                the other are not alone, then.
        """
        if kind.unnamed:
            self.unnamed.append(kind.name)
        elif not (unnamed and is_of_a_parameter(kind.name)) and kind.name not in self.alone:
            self.alone.append(kind.name)

    def notes(self) -> list[str]:
        """A sentence for each reason."""
        reasons = (
            (
                self.uncertain,
                "kind(s) are not compared",
                "the numbers of their blocks are only counted from the file, and may not be the "
                "same. Pass --base, which knows them.",
            ),
            (self.apart, "kind(s) are not compared", "they adapt them in different blocks."),
            (
                self.unnamed,
                "kind(s) are not compared",
                "a LoRA's file does not say which of a module's parameters they are. Pass --base, "
                "which knows.",
            ),
            (
                self.alone,
                "kind(s) are not compared",
                "only one of the two files has pairs for them, or they are of another shape.",
            ),
            (
                self.layers,
                "kind(s) are compared in some layers",
                "only one of the two adapts the others.",
            ),
        )
        return [f"{len(its)} {what}, such as {its[0]}: {why}" for its, what, why in reasons if its]


def _counterpart(kind: StoredKind, first: StoredAdapter, second: StoredAdapter) -> Any:
    """The kind of the second adapter with the same name and shape, if there is one.

    With a base a name may carry its list of blocks, where several lists have such a kind
    (`decoder.block:…`). Without it, it is the same kind only where no other list has one.
    """
    for identity in (_whole, _bare):
        ours, theirs = (
            [its for its in adapter.kinds if identity(its) == identity(kind)]
            for adapter in (first, second)
        )
        if len(ours) == len(theirs) == 1:
            return theirs[0]
    return None


def _whole(kind: StoredKind) -> tuple[str, int, int]:
    return kind.name, kind.out_features, kind.in_features


def _bare(kind: StoredKind) -> tuple[str, int, int]:
    return kind.name.rpartition(":")[2], kind.out_features, kind.in_features


def _shared(
    first: StoredKind, second: StoredKind, same_weights: bool
) -> list[tuple[StoredSite, StoredSite]]:
    """The sites of the same layers; none where it is not certain which these are.

    Args:
        first: of the one adapter.
        second: of the other.
        same_weights: the adapters are known to adapt the same.
    """
    if first.counted or second.counted:
        count = len(first.sites)
        known = [[its.layer for its in kind.sites] for kind in (first, second) if not kind.counted]
        # Whoever only counts has to mean all blocks, and whoever knows the numbers has to have all.
        all_blocks = all(its in (list(range(count)), [None]) for its in known) and all(
            its.everywhere for its in (first, second) if its.counted
        )
        certain = (same_weights or all_blocks) and len(second.sites) == count
        return list(zip(first.sites, second.sites, strict=True)) if certain else []
    places = {site.layer: site for site in second.sites}
    return [(site, places[site.layer]) for site in first.sites if site.layer in places]


def _compare(first: StoredKind, second: StoredKind, same_weights: bool) -> KindComparison | None:
    shared = _shared(first, second, same_weights)
    if not shared:
        return None
    coordinates = Coordinates([*first.pairs, *second.pairs])
    ours = coordinates.updates([site.pairs for site, _ in shared])
    offset = len(first.pairs)
    theirs = coordinates.updates([[offset + its for its in site.pairs] for _, site in shared])
    shape = first.matrix
    ranks = [numerical_ranks(its.values, *shape) for its in (ours, theirs)]
    columns = [spans(its.left, rank) for its, rank in zip((ours, theirs), ranks, strict=True)]
    rows = [spans(its.right, rank) for its, rank in zip((ours, theirs), ranks, strict=True)]
    random_columns, random_rows = numbers(mean_larger(*ranks) / torch.tensor(shape))
    return KindComparison(
        first.name,
        tuple((other if first.counted else one).layer for one, other in shared),
        numbers(layer_cosines(ours, theirs)),
        numbers(overlaps(*columns).diagonal()),
        numbers(overlaps(*rows).diagonal()),
        random_columns,
        random_rows,
    )
