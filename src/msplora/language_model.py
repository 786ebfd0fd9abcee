"""Which part of a model with several is the language model: what LoRA servers adapt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from .adapted import embeddings_of


def outside_language_model(root: Any) -> Callable[[str], bool]:
    """What tells by its path whether a module lies in a tower or a connector.

    Where a model is all language model, or cannot be told apart, nothing does.
    """
    config: Any = getattr(root, "config", None)
    try:
        text = config.get_text_config()
    except (AttributeError, ValueError):  # no config of transformers; several texts
        return lambda _: False
    if text is config:
        return lambda _: False
    inside = [
        path
        for path, module in root.named_modules()
        if path
        and isinstance(module, PreTrainedModel)
        and getattr(module.config, "model_type", None) == text.model_type
    ]
    if not inside:
        return lambda _: False
    inside += [path for path, _ in embeddings_of(root)]
    return lambda path: not any(path == its or path.startswith(f"{its}.") for its in inside)
