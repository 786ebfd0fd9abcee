"""What rows have to know of a model, without its weights: a download, or minutes of reading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from msplora.loading import loading_errors_explained, quiet_loading, resolve_source

from .base_model import config_and_class, hub_options, load_tokenizer
from .data_classification import Classes
from .end_tokens import end_tokens
from .lengths import Limit, row_limit
from .settings import Settings


@dataclass(frozen=True)
class Outline:
    """A model as its configs describe it."""

    model: Any
    """On the meta device."""
    tokenizer: Any
    limit: Limit
    """Of a row's tokens."""
    ends: set[int]
    """The ids at which generation stops."""


def outline(settings: Settings, classes: Classes | None) -> Outline:
    """Return the outline of the model of a run over texts.

    Raises:
        MSPLoraError: there is no such model, or its rows cannot be as long as asked.
    """
    source = resolve_source(settings.model)
    config, loader = config_and_class(settings, classes, source)
    code = {"trust_remote_code": settings.trust_remote_code}
    with loading_errors_explained(source), quiet_loading(), torch.device("meta"):
        model = loader.from_config(config, **code)
    try:
        generation = transformers.GenerationConfig.from_pretrained(source, **hub_options(settings))
    except OSError:  # older models keep it in the config
        generation = None
    tokenizer = load_tokenizer(settings)
    ends = end_tokens(tokenizer, model.config, generation)
    return Outline(model, tokenizer, row_limit(settings, model), ends)
