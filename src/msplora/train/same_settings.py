"""What differs between the settings a run began with and those it is resumed under."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from .settings import Settings
from .settings_methods import LORAS

EVAL_BATCH_SIZE = "training.eval_batch_size"

_FREE_TO_CHANGE = frozenset(
    {
        "output",
        EVAL_BATCH_SIZE,
        "training.check_saved",
        "training.report_to",
        "training.save_limit",
        "training.save_steps",
    }
)


def free_to_change(method: str) -> frozenset[str]:
    """Keys that change no number of a run's result, so that it may be resumed under others.

    With Lily what a row is answered depends on the rows beside it, so that evaluations in other
    batches may keep another checkpoint.
    """
    return _FREE_TO_CHANGE - {EVAL_BATCH_SIZE} if method == "lily" else _FREE_TO_CHANGE


def differences(before: Settings, now: Settings, free: Set[str]) -> str:
    """What changed, in words; nothing where a run of the one goes on under the other.

    Args:
        before: what it began with.
        now: what it is to go on with.
        free: keys that may change.
    """
    first, second = flat(before.to_dict()), flat(now.to_dict())
    return "; ".join(
        f"{key} was {first.get(key)!r} and is {second.get(key)!r}"
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key) and key not in free
    )


def can_start_from(before: Settings, now: Settings) -> bool:
    """Whether `init_from` takes the adapter that the one trained for the other."""
    return before.method == now.method and now.method in ("msplora", *LORAS)


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and key != "columns":
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
