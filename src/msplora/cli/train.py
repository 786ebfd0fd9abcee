"""Placeholder of the first commit."""


def train() -> None:
    """Not built yet."""
