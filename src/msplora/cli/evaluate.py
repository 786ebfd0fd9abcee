"""Placeholder of the first commit."""


def evaluate() -> None:
    """Not built yet."""
