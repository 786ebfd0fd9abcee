"""Weights that are in no file: transformers makes them up, and says so where nobody looks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable


class RandomWeightsWarning(UserWarning):
    """Weights of a base are in no file, so that they are others at every loading."""


def warn_of_random(source: str, names: Iterable[str]) -> None:
    """Say which weights of a base neither its files nor its adapter's have.

    Args:
        source: the base's folder or hub id.
        names: of the weights; with none nothing is said.
    """
    if names := sorted(names):
        warnings.warn(
            f"{source} lacks {', '.join(names[:5])}, and the adapter does not bring them: they "
            f"are random numbers, others at each loading, and not those of the training. Pass a "
            f"base that has them, or train again with the modules in modules_to_save.",
            RandomWeightsWarning,
            stacklevel=3,
        )
