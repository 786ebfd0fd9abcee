"""Placeholder of the first commit."""


def convert() -> None:
    """Not built yet."""
