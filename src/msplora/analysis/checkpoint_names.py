"""What a checkpoint calls the weights of a model that transformers names otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msplora import _peft


def by_names_of_model(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """The names under which transformers puts a checkpoint's tensors into a model → those there.

    Those of which it makes other tensors, as one of several, are left out.

    Args:
        model: the model, whose weights are not looked at.
        stored: the names in the checkpoint.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:  # before transformers 5
        patterns = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        return {_peft.renamed(name, patterns): name for name in stored}
    conversions = get_model_conversion_mapping(model)
    renamings = [its for its in conversions if isinstance(its, WeightRenaming)]
    converters = [its for its in conversions if isinstance(its, WeightConverter)]
    of_model = model.state_dict()
    found: dict[str, str] = {}
    for name in stored:
        prefix = model.base_model_prefix
        loaded, converter = rename_source_key(name, renamings, converters, prefix, of_model)
        if loaded not in of_model and name in of_model:  # as transformers does: it has the name
            loaded, converter = name, None
        if converter is None:
            found[loaded] = name
    return found
