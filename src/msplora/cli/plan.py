"""Placeholder of the first commit."""


def plan() -> None:
    """Not built yet."""
