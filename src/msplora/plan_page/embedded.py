"""What the page of a plan counts with: the same rules as `pyramid.py`, as numbers.

Of a kind of L layers, a level of rank R and G groups has ``min(G, L)`` pairs (L where G is 0) of
``a R + b floor(R / splits)`` numbers each. pyramid.js computes that, and a test compares it.
"""

from __future__ import annotations

import math
import re
from typing import Any

from msplora.plan_text import ranges
from msplora.pyramid import PER_LAYER, Kind, Level, Plan

_LEAST_RANK = 64
"""The sliders reach at least as far."""
_MANY = 4
"""As many kinds that are alike but for a number in their paths are drawn once."""


def embedded(plan: Plan) -> dict[str, Any]:
    """Everything that the page's script knows."""
    ranks = [level.rank for level in plan.levels]
    most = max(kind.layers for kind in plan.kinds)
    kinds = [_kind(kind, plan) for kind in plan.kinds]
    for its, place in zip(kinds, _drawn_at(kinds), strict=True):
        its["drawnAt"] = place
    return {
        "levels": [_level(level, most) for level in plan.levels],
        "halved": ranks == [ranks[0], ranks[0] // 2, ranks[0] // 4],
        "mostRank": max(_LEAST_RANK, 2 * max(ranks)),
        "mostLayers": most,
        "magnitudes": plan.magnitude_parameters,
        "kinds": kinds,
    }


def _level(level: Level, most: int) -> dict[str, Any]:
    # As many groups as there are layers, or more, is a pair for each.
    groups = PER_LAYER if level.groups >= most else level.groups
    return {
        "name": level.name,
        "rank": level.rank,
        "groups": groups,
        "alpha": level.alpha,
        "rslora": level.use_rslora,
    }


def _kind(kind: Kind, plan: Plan) -> dict[str, Any]:
    shape = kind.shape
    splits = shape.blocks if shape.layout == "conv" else 1
    return {
        "name": kind.name,
        "stack": kind.stack,
        "path": kind.path,
        "shape": str(shape),
        "a": math.prod(shape.a(splits)) // splits,
        "b": math.prod(shape.b(splits)),
        "splits": splits,
        # A pattern's rank and alphas stay as they are, each without the other.
        "rank": kind.levels[0].rank if kind.own_rank else None,
        "alphas": _own_alphas(kind, plan),
        "pattern": _pattern(kind, plan),
        "blocks": [0 if site.block is None else site.block for site in kind.sites],
        "inBlocks": kind.sites[0].block is not None,
        "shown": ranges([site.block for site in kind.sites]),
        "sites": [site.key for site in kind.sites],
    }


def _drawn_at(kinds: list[dict[str, Any]]) -> list[int]:
    """The place of the kind whose drawing stands for each: experts of one place have one."""
    alike: dict[str, list[int]] = {}
    for place, its in enumerate(kinds):
        what = {name: its[name] for name in ("stack", "shape", "rank", "alphas", "blocks")}
        alike.setdefault(f"{re.sub(r'[0-9]+', '#', its['path'])} {what}", []).append(place)
    first = {
        place: places[0] for places in alike.values() if len(places) >= _MANY for place in places
    }
    return [first.get(place, place) for place in range(len(kinds))]


def _pattern(kind: Kind, plan: Plan) -> str:
    """What names a kind, and no other, as a key of alpha_pattern."""
    if sum(f".{its.path}".endswith(f".{kind.path}") for its in plan.kinds) == 1:
        return kind.path
    return f"{kind.stack}.*{kind.path}"


def _own_alphas(kind: Kind, plan: Plan) -> list[float] | None:
    """A kind's alphas, level by level, where they are not the plan's."""
    its = [level.alpha for level in kind.levels]
    return None if its == [level.alpha for level in plan.levels] else its
