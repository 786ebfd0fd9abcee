"""Placeholder of the first commit."""


def predict() -> None:
    """Not built yet."""
