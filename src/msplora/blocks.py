"""Where a site lies among the blocks of a model, and which blocks a config asks for."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from . import _peft
from .errors import TargetError


def place(
    model: nn.Module, key: str, layers_pattern: list[str] | str | None = None
) -> tuple[str, int | None, str]:
    """Where a site lies: the path of its list of blocks, its block's number, the path inside it.

    The list is the outermost `ModuleList` or `Sequential` with numbered children on the way, or
    what `layers_pattern` names. A site outside every list is a stack of its own.
    """
    names = key.split(".")
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or []
    module: Any = model
    for place_, name in enumerate(names):
        if name.isdigit():
            path = ".".join(names[:place_])
            if patterns:
                is_list = any(re.search(rf"(^|\.){pattern}$", path) for pattern in patterns)
            else:
                is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
            if is_list:
                return path, int(name), ".".join(names[place_ + 1 :]) or "self"
        module = _peft.unwrapped(getattr(module, name)) if hasattr(module, name) else None
    return key, None, key


def wanted_blocks(config: Any) -> set[int] | None:
    """The numbers in `layers_to_transform`; `None` where it asks for all blocks."""
    wanted = config.layers_to_transform
    if isinstance(wanted, int):
        return {wanted}
    return set(wanted) if wanted else None


def check_layers(model: nn.Module, config: Any, paths: list[str]) -> None:
    """Refuse a block that no list of the model has.

    Raises:
        TargetError: there is one, or `layers_pattern` names no list.
    """
    wanted = wanted_blocks(config)
    if wanted is None:
        return
    lists: dict[str, set[int]] = {}
    for path in paths:
        stack, block, _ = place(model, path, config.layers_pattern)
        if block is not None:
            lists.setdefault(stack, set()).add(block)
    if config.layers_pattern and not lists:
        stacks = {stack for path in paths if (stack := place(model, path)[0]) != path}
        raise TargetError(
            f"layers_pattern = {config.layers_pattern!r} names no list of blocks of this model. "
            f"Its lists are {', '.join(map(repr, sorted(stacks)))}."
        )
    missing = sorted(wanted.difference(*lists.values()))
    if missing:
        described = ", ".join(
            f"{stack!r} has blocks 0 to {max(blocks)}" for stack, blocks in lists.items()
        )
        raise TargetError(
            f"layers_to_transform asks for {missing}, which no list of blocks has: "
            f"{described or 'this model has no list of blocks'}."
        )


def check_layers_reached(
    modules: Mapping[str, nn.Module],
    config: Any,
    adapted: Collection[str],
    is_target: Callable[[Any, str], bool],
) -> None:
    """Refuse a config by which PEFT adapts other blocks than `layers_to_transform` lists.

    PEFT reads a block's number off the path. Without `layers_pattern` it needs a name before that
    of the list, else it takes an expert's number, or none; before 0.20 it takes the last number.

    Args:
        modules: the model's own, by path, the model itself as "".
        config: the adapter's.
        adapted: the paths of those that PEFT adapts.
        is_target: whether PEFT adapts, by a config, the module of a path.

    Raises:
        TargetError: PEFT passes a module by that lies in a listed block, or adapts one that lies in
            another.
    """
    wanted = wanted_blocks(config)
    if wanted is None:
        return
    everywhere = copy.copy(config)
    everywhere.layers_to_transform = None
    places = {
        path: place(modules[""], path, config.layers_pattern)
        for path in modules
        if path and is_target(everywhere, path)
    }
    for path, (stack, block, inside) in places.items():
        if block is None or (block in wanted) == (path in adapted):
            continue
        lies = f"{path!r} lies in block {block} of {repr(stack) if stack else 'the model itself'}"
        in_full = not isinstance(config.target_modules, str) and path in config.target_modules
        if in_full and path in adapted:
            raise TargetError(
                f"{lies}, which is not in layers_to_transform = {config.layers_to_transform}; but "
                f"PEFT adapts what target_modules names in full whatever the block. Name it by the "
                f"end of its path, or leave it out."
            )
        beside = {its: number for its, (list_, number, _) in places.items() if list_ == stack}
        named = copy.copy(config)
        named.layers_pattern = stack.rpartition(".")[2]
        if stack and all(is_target(named, its) == (beside[its] in wanted) for its in beside):
            advice = f"Set layers_pattern={named.layers_pattern!r}."
        else:
            advice = (
                f"Leave layers_to_transform out and name the blocks by a regular expression "
                f"instead: target_modules={_expression(stack, wanted, inside)!r}."
            )
        raise TargetError(
            f"layers_to_transform = {config.layers_to_transform}: {lies}, but PEFT, which reads "
            f"the number off the path, {'adapts it' if path in adapted else 'passes it by'}. "
            f"{advice}"
        )


def _expression(stack: str, wanted: set[int], inside: str) -> str:
    """What `inside` means in the wanted blocks, and what differs from it by a number alone."""
    names = [r"\d+" if name.isdigit() else re.escape(name) for name in inside.split(".")]
    blocks = f"({'|'.join(map(str, sorted(wanted)))})"
    parts = [*map(re.escape, stack.split(".") if stack else ()), blocks]
    return r"\.".join(parts if inside == "self" else [*parts, *names])
