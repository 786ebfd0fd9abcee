"""Placeholder of the first commit."""


def demo() -> None:
    """Not built yet."""
