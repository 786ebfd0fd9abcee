"""Placeholder of the first commit."""


def generate() -> None:
    """Not built yet."""
