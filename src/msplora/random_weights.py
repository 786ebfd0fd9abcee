"""Weights that are in no file: transformers makes them up, and says so where nobody looks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

_RANDOM = "random numbers, others at each loading, and not those of the training"


class RandomWeightsWarning(UserWarning):
    """Weights of a base are in no file, so that they are others at every loading."""


class RandomPoolerWarning(UserWarning):
    """The same of weights that only `pooler_output` depends on."""


def warn_of_random(source: str, names: Iterable[str], model: Any) -> None:
    """Say which weights of a base neither its files nor its adapter's have.

    Args:
        source: the base's folder or hub id.
        names: of the weights; with none nothing is said.
        model: the base. Of one without a head a pooler has no part in the last hidden state.
    """
    without_head = getattr(model, "base_model", None) is model
    pooler = sorted(its for its in names if without_head and ".pooler." in f".{its}")
    others = sorted(set(names) - set(pooler))
    if others:
        warnings.warn(
            f"{source} lacks {', '.join(others[:5])}, and the adapter does not bring them: they "
            f"are {_RANDOM}. Pass a base that has them, or train again with the modules in "
            f"modules_to_save.",
            RandomWeightsWarning,
            stacklevel=3,
        )
    if pooler:
        warnings.warn(
            f"Its pooler is in no file and is made up of {_RANDOM}: read last_hidden_state, and "
            f"not pooler_output.",
            RandomPoolerWarning,
            stacklevel=3,
        )


def warn_of_new_rows(names: Iterable[str], wanted: int) -> None:
    """Say which embeddings of a base are given rows that no file has.

    Args:
        names: of the weights; with none nothing is said.
        wanted: their rows, as many as the adapter brings of another embedding.
    """
    if names := sorted(names):
        warnings.warn(
            f"the adapter brings embeddings of {wanted:,} tokens, more than the base has, and not "
            f"{', '.join(names)}: the rows that it is given there are {_RANDOM}. Pass the base as "
            f"it was resized for the training, or save the adapter with "
            f"save_embedding_layers=True.",
            RandomWeightsWarning,
            stacklevel=3,
        )
