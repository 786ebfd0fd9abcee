"""What the page of a plan counts with: the same rules as `pyramid.py`, as numbers.

Of a kind of L layers, a level of rank R and G groups has ``min(G, L)`` pairs (L where G is 0) of
``a R + b floor(R / splits)`` numbers each. pyramid.js computes that, and a test compares it.
"""

from __future__ import annotations

import math
from typing import Any

from msplora.plan_text import ranges
from msplora.pyramid import PER_LAYER, Kind, Level, Plan

_LEAST_RANK = 64
"""The sliders reach at least as far."""


def embedded(plan: Plan) -> dict[str, Any]:
    """Everything that the page's script knows."""
    ranks = [level.rank for level in plan.levels]
    most = max(kind.layers for kind in plan.kinds)
    return {
        "levels": [_level(level, most) for level in plan.levels],
        "halved": ranks == [ranks[0], ranks[0] // 2, ranks[0] // 4],
        "mostRank": max(_LEAST_RANK, 2 * max(ranks)),
        "mostLayers": most,
        "magnitudes": plan.magnitude_parameters,
        "kinds": [_kind(kind, plan) for kind in plan.kinds],
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
        "blocks": [0 if site.block is None else site.block for site in kind.sites],
        "inBlocks": kind.sites[0].block is not None,
        "shown": ranges([site.block for site in kind.sites]),
        "sites": [site.key for site in kind.sites],
    }


def _own_alphas(kind: Kind, plan: Plan) -> list[float] | None:
    """A kind's alphas, level by level, where they are not the plan's."""
    its = [level.alpha for level in kind.levels]
    return None if its == [level.alpha for level in plan.levels] else its
