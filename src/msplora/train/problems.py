"""pydantic's account of what is wrong with a file, in the words of this project's errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def described(problem: Any, key: str, hint: str = "") -> str:
    """Return one problem as a sentence.

    Args:
        problem: one of `ValidationError.errors()`.
        key: the dotted key as the file shows it.
        hint: follows the sentence; begins with a blank.
    """
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}.{hint}"
    if problem["type"] == "missing":
        return f"the key {key!r} is missing; it is required."
    return f"{key} = {problem['input']!r}: {reason(problem)}.{hint}"


def reason(problem: Any) -> str:
    """What pydantic says of a value, as the end of a sentence that names it."""
    return problem["msg"].removeprefix("Value error, ").replace("Input should", "it should")


def together(lines: Iterable[str], source: str) -> str:
    """Return one message of all problems of `source`, each said once."""
    lines = list(dict.fromkeys(lines))
    if len(lines) == 1:
        return f"in {source}: {lines[0]}"
    return f"in {source}:\n" + "\n".join(f"  - {line}" for line in lines)
