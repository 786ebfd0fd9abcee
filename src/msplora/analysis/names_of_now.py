"""A LoRA's file whose weights an earlier transformers named otherwise, by the names of now."""

from __future__ import annotations

from typing import Any

from msplora import _peft
from msplora.errors import BaseModelError

from .base import Base
from .on_disk import TensorsOnDisk


def by_names_of_now(tensors: TensorsOnDisk, config: Any, base: Base) -> TensorsOnDisk:
    """The tensors by the names that PEFT gives them while it loads them on this base.

    Raises:
        BaseModelError: it makes other tensors of them, too.
    """
    stored = {id(its): name for name, its in tensors.shapes.items()}
    loaded = _peft.as_loaded(base.model, config, tensors.shapes)
    if any(id(its) not in stored for its in loaded.values()) or len(loaded) != len(stored):
        raise BaseModelError(
            f"{tensors.path} names weights that transformers stores as one now, such as a layer's "
            f"experts: PEFT converts the pairs while loading, and they are not laid beside the "
            f"base {base.source!r}. Analyse it without --base."
        )
    return tensors.renamed({name: stored[id(its)] for name, its in loaded.items()})
