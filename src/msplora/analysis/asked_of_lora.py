"""What a LoRA's config asks of a pair, by the name under which PEFT matches its patterns.

Two sorts of weights have another name there than in the file. The output of an attention is adapted
with it, and is matched as the attention. Parameters (`target_parameters`) are matched as
`…experts.down_proj`; but PEFT wraps those of one module around each other, so that the file says
`…experts` of the last and `…experts.base_layer` of the one before it. The base tells which they
are. Without it that stays open, unless only one order of them fits the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

from torch import nn

from msplora import _peft
from msplora.errors import BaseModelError
from msplora.matching import pattern_matches
from msplora.parameters import own_parameters

from .base import Base

_INSIDE = ".base_layer"


@dataclass(frozen=True)
class Asked:
    """What is asked of one pair."""

    name: str
    """The weight's path in the model; in the file, where that does not tell which it is."""
    rank: int
    alpha: float
    use_rslora: bool
    is_parameter: bool = False
    """Then the pair may be that of several experts."""

    def scale(self, rank: int) -> float:
        """alpha / rank; rank-stabilised, alpha / sqrt(rank)."""
        return self.alpha / (math.sqrt(rank) if self.use_rslora else rank)


def asked_of(rows: Mapping[str, int], config: Any, base: Base | None) -> dict[str, list[Asked]]:
    """What a config asks of each pair of a file.

    Args:
        rows: the name of a pair in the file → the rows of its A.
        config: PEFT's, of a LoRA.
        base: the base, where it is known.

    Returns:
        For each pair what may be asked of it: several things where the file alone leaves them open.

    Raises:
        BaseModelError: a module of the base has other parameters than the file has pairs.
    """
    found: dict[str, list[Asked]] = {}
    nests: dict[str, list[str]] = {}
    parameters: dict[str, list[str]] = {}
    for key in rows:
        module = key.partition(_INSIDE)[0]
        parameters[module] = _parameters(module, config, base)
        if parameters[module]:
            nests.setdefault(module, []).append(key)
        else:
            found[key] = [_asked(key.replace(_INSIDE, ""), module, config)]
    for module, keys in nests.items():
        keys.sort(key=len)  # the outermost first
        names = parameters[module]
        if base is not None and len(names) != len(keys):
            raise BaseModelError(
                f"the base {base.source!r} does not match the adapter: target_parameters names "
                f"{len(names)} parameter(s) of {module!r} ({', '.join(names)}), and the file has "
                f"{len(keys)} pair(s). Pass the model that the adapter was made for."
            )
        asked = [_asked(name, name, config, is_parameter=True) for name in names]
        orders = [asked[::-1]] if base is not None else _orders(asked, [rows[key] for key in keys])
        for place, key in enumerate(keys):
            found[key] = _distinct(key, [order[place] for order in orders])
    return found


def _parameters(module: str, config: Any, base: Base | None) -> list[str]:
    """Paths of the parameters of a module that PEFT may have wrapped, the innermost first.

    There are none of a module that is adapted itself. Without the base they are those that the
    config could mean, in no order.
    """
    wanted = getattr(config, "target_parameters", None) or ()
    if not wanted or (config.target_modules and _peft.is_target(config, module)):
        return []
    if base is None:
        names = list(dict.fromkeys(its.rpartition(".")[2] for its in sorted(wanted)))
    else:
        holder = base.module(module)
        names = own_parameters(holder) if isinstance(holder, nn.Module) else []
    paths = [f"{module}.{name}" for name in names]
    return [its for its in paths if any(its == one or its.endswith(f".{one}") for one in wanted)]


def _orders(asked: Sequence[Asked], rows: Sequence[int]) -> list[Sequence[Asked]]:
    """The orders in which parameters may be wrapped.

    Those of one module have as many experts, so ranks that differ tell which is which.
    """
    orders: list[Sequence[Asked]] = list(permutations(asked, len(rows)))
    fitting = [
        order
        for order in orders
        if len({divmod(its, one.rank) for its, one in zip(rows, order, strict=True)}) == 1
        and rows[0] % order[0].rank == 0
    ]
    # A file with more pairs than the config names parameters is not this config's.
    return fitting or orders or [[asked[0]] * len(rows)]


def _distinct(key: str, options: Sequence[Asked]) -> list[Asked]:
    """What may be asked of one pair; which weight it is does not matter where that is the same."""
    found = list(dict.fromkeys(options))
    if len({(its.rank, its.alpha) for its in found}) == 1 < len(found):
        return [replace(found[0], name=key)]
    return found


def _asked(name: str, matched: str, config: Any, is_parameter: bool = False) -> Asked:
    return Asked(
        name,
        _value(config.rank_pattern, matched, config.r),
        _value(config.alpha_pattern, matched, config.lora_alpha),
        bool(config.use_rslora),
        is_parameter,
    )


def _value(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches."""
    values = (its for pattern, its in (patterns or {}).items() if pattern_matches(pattern, name))
    return next(values, otherwise)
