"""Whether two names mean the same base model."""

from __future__ import annotations

from pathlib import Path


def same_source(one: str, other: str) -> bool:
    """Two ids of the hub, or two paths to one folder."""
    first, second = Path(one).expanduser(), Path(other).expanduser()
    return one == other or (first.exists() and second.exists() and first.samefile(second))
