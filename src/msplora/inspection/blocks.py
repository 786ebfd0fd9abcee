"""Whole layers or targets that a file lacks: its names agree with each other, and not with all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msplora import _peft

from .results import Finding
from .suspicions import some

ALL_ALIKE = "If the model's blocks are all alike, the file lacks pairs."


def absent_targets(config: Any, paths: Sequence[str]) -> list[Finding]:
    """Names of the config's target_modules for which the file has no pair.

    Args:
        config: PEFT's.
        paths: of the weights that the file has pairs for, from the model or from the block.
    """
    targets = config.target_modules
    # One string is a regular expression; a tied head is listed and borrows its embedding's pairs.
    if not paths or isinstance(targets, str) or getattr(config, "ensure_weight_tying", False):
        return []
    absent = sorted(
        its
        for its in targets or ()
        if not any(_meets(its, path) for path in paths) and not _peft.is_excluded(config, its)
    )
    if not absent:
        return []
    text = (
        f"The config's target_modules list {some(absent)}, of which the file has no pair. If the "
        f"model has such weights, the file is not whole; save or copy it again."
    )
    return [Finding("missing target", "warning", text, tuple(absent))]


def _meets(target: str, path: str) -> bool:
    """Whether one ends with the other: paths in a pyramid's file start at the block."""
    return f".{path}".endswith(f".{target}") or f".{target}".endswith(f".{path}")


def absent_layers(config: Any, layers: Mapping[str, int]) -> list[Finding]:
    """Kinds that have fewer or more layers than layers_to_transform lists.

    Args:
        config: PEFT's.
        layers: kind → how many layers it has.
    """
    if config.layers_to_transform is None:
        return []
    wanted = len(_listed(config))
    unlike = {kind: its for kind, its in layers.items() if its != wanted}
    if not wanted or not unlike:
        return []
    said = some([f"{kind} has {its}" for kind, its in unlike.items()])
    text = f"layers_to_transform lists {wanted} block(s), and {said}. {ALL_ALIKE}"
    return [Finding("missing layer", "warning", text, tuple(unlike))]


def _listed(config: Any) -> set[int]:
    asked = config.layers_to_transform
    return {asked} if isinstance(asked, int) else set(asked)
