"""An adapter on the shapes of its base: what can be had of it without the base's weights.

A base of 140 GB is on few machines, and a plain LoRA is made of the adapter's file alone.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from peft import PeftConfig
from torch import Tensor, nn

from .adapted import Adapted, put_on
from .classifier_head import label_options
from .errors import MSPLoraError
from .loading import (
    BaseOptions,
    class_names,
    loading_errors_explained,
    read_config,
    read_tensors,
    resolve_source,
    without_weights,
)


def base_of_shapes(
    config: PeftConfig,
    base: BaseOptions,
    tensors: Mapping[str, Tensor] | None = None,
    classes: Sequence[str] = (),
) -> nn.Module | None:
    """The base of an adapter on the meta device; None where nothing names it.

    Raises:
        MSPLoraError: it cannot be found, or not be built of its config.
    """
    source = base.source or config.base_model_name_or_path
    if not source:
        return None
    source = resolve_source(source)
    with loading_errors_explained(source):
        of_base = transformers.AutoConfig.from_pretrained(
            source,
            revision=base.revision_for(config),
            trust_remote_code=base.trust_remote_code,
            **label_options(config, tensors or {}, classes),
        )
    return without_weights(config, of_base, source, base)


def load_on_shapes(folder: Path, base: BaseOptions) -> Adapted | None:
    """As `adapted.load_on_base`, on a base that has no weights.

    Returns:
        None where the weights have a say: embeddings in the file may be the base's own; DoRA starts
        from the norms of the weights; and what cannot be built without them, or does not fit, is to
        be found out with them.
    """
    config: Any = read_config(folder)
    if getattr(config, "use_dora", False):
        return None
    tensors = read_tensors(folder)
    with contextlib.suppress(MSPLoraError, RuntimeError, ValueError), warnings.catch_warnings():
        # A head finds no storage, and is taken from the file.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        model = base_of_shapes(config, base, tensors, class_names(folder))
        if model is not None:
            adapted = Adapted(put_on(model, folder), tensors)
            return None if adapted.embeddings() & tensors.keys() else adapted
    return None
