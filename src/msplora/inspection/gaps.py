"""Blocks that a LoRA's file has no pair for, by the numbers of those that it has.

The file does not say how many blocks the model has, nor whether they are alike: in some models
attention is in every fourth block only. So a place is compared with what lies around it: with the
other projections of the same module, and with the other modules of the same list of blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from msplora import _peft

from .blocks import ALL_ALIKE
from .results import Finding
from .suspicions import note, some

Place = tuple[str, int | None, str]
"""The list of blocks that a weight is in, the number of its block, and its path inside."""

_REGULAR = 3
"""So many numbers at the same distance are a pattern."""
_SELF = "self"
"""What the elements of a list are called that are weights themselves, as in an nn.Sequential."""


def gaps(config: Any, places: Iterable[Place]) -> list[Finding]:
    """What a LoRA lacks by the blocks that it has.

    Args:
        config: PEFT's.
        places: of its weights.
    """
    targets = config.target_modules
    # Whoever asks by a regular expression or by full paths may have left blocks out.
    chosen = isinstance(targets, str) or any(
        part.isdigit() for its in targets or () for part in its.split(".")
    )
    if chosen or config.layers_to_transform is not None:
        return []
    lacking: dict[str, set[int]] = {}
    elsewhere: dict[str, set[int]] = {}
    places = list(places)
    for modules in _by_list([*places, *_excluded(config, places)]).values():
        together = set().union(*(blocks for kinds in modules.values() for blocks in kinds.values()))
        for module, kinds in modules.items():
            has = set().union(*kinds.values())
            missing = set(range(max(together) + 1)) - has
            nowhere = missing - together
            if nowhere and not _regular(has) and not _regular(missing):
                lacking[module] = nowhere
            elif missing:
                elsewhere[module] = missing
            for kind, blocks in kinds.items():
                beside = _beside(blocks, [its for name, its in kinds.items() if name != kind])
                if beside:
                    (elsewhere if _regular(beside) else lacking)[kind] = beside
    return [*_warned(lacking), *_noted(elsewhere)]


def _excluded(config: Any, places: Iterable[Place]) -> list[Place]:
    """What exclude_modules leaves out in blocks up to the last: that is as good as there."""
    if not config.exclude_modules:
        return []
    last: dict[str, int] = {}
    paths: dict[tuple[str, str], None] = {}
    for blocks, number, path in places:
        if number is not None:
            last[blocks] = max(number, last.get(blocks, 0))
            paths[blocks, path] = None
    return [
        (blocks, number, path)
        for blocks, path in paths
        for number in range(last[blocks])
        if _peft.is_excluded(config, f"{blocks}.{number}.{path}")
    ]


def _by_list(places: Iterable[Place]) -> dict[str, dict[str, dict[str, set[int]]]]:
    """List of blocks → module inside the block → path of a weight → the numbers of its blocks."""
    found: dict[str, dict[str, dict[str, set[int]]]] = {}
    for blocks, number, path in places:
        if number is not None and path != _SELF:
            module = path.rpartition(".")[0] or path
            kinds = found.setdefault(blocks, {}).setdefault(module, {})
            kinds.setdefault(path, set()).add(number)
    return found


def _beside(blocks: set[int], others: list[set[int]]) -> set[int]:
    """Blocks that others of the same module have, which are in most of the same blocks."""
    found: set[int] = set()
    for its in others:
        if 2 * len(its & blocks) > len(its | blocks):
            found |= its - blocks
    return found


def _regular(numbers: set[int]) -> bool:
    """Whether they are at the same distance, which is more than 1."""
    distances = {high - low for low, high in pairwise(sorted(numbers))}
    return len(numbers) >= _REGULAR and len(distances) == 1 and distances != {1}


def _warned(lacking: dict[str, set[int]]) -> list[Finding]:
    if not lacking:
        return []
    text = f"Blocks are left out: {_said(lacking)}. {ALL_ALIKE}"
    return [Finding("missing layer", "warning", text, tuple(lacking))]


def _noted(elsewhere: dict[str, set[int]]) -> list[Finding]:
    if not elsewhere:
        return []
    text = (
        f"Not every block has every weight: {_said(elsewhere)}, which other weights are in, or "
        f"which are regular. In a model of blocks of several sorts that is as it should be."
    )
    return [note(text, *elsewhere)]


def _said(found: dict[str, set[int]]) -> str:
    said = []
    for name, numbers in found.items():
        more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
        said.append(f"{name} lacks block {min(numbers)}{more}")
    return some(said)
