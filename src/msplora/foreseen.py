"""What a conversion will refuse, found on the base without its weights, before they are loaded."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from .config import MSPLoraConfig
from .forms import PlainLora, in_form
from .loading import BaseOptions
from .on_shapes import base_of_shapes
from .plain_lora import Padding, lora_of
from .server_limits import check_features, check_served, features
from .serving import Form, Server


def foresee(
    config: MSPLoraConfig,
    base: BaseOptions,
    *,
    form: Form,
    pad_to: Padding,
    server: Server | None,
    max_lora_rank: int | None,
) -> None:
    """Refuse what the form, the padding or the server cannot take, by the shapes alone.

    Where the base cannot be built without its weights nothing is foreseen: what is refused here is
    refused again when they are loaded.

    Raises:
        MSPLoraError: the base cannot be found, or what is asked for cannot be written or served.
    """
    if form == "lora" and pad_to == "none" and server is None:
        return
    adapted = _adapted_without_weights(config, base)
    if adapted is None:
        return
    found = features(adapted)
    if server is not None:  # first: of what it cannot serve there may be no plain LoRA
        check_features(found, server)
    with torch.device("meta"):
        tensors, lora = lora_of(adapted, pad_to=pad_to)
    if server is not None:
        check_served(found, server, lora["r"], max_lora_rank)
    root: Any = adapted.get_base_model()
    in_form(form, PlainLora(tensors, lora, root.config))


def _adapted_without_weights(config: MSPLoraConfig, base: BaseOptions) -> PeftModel | None:
    its: Any = copy.deepcopy(config)
    its.use_dora = False  # PEFT measures the weights for it, and there are none
    its.init_lora_weights = True
    try:
        model: Any = base_of_shapes(config, base)
        if model is None:
            return None
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real model's are given when it is loaded
            adapted = get_peft_model(model, its)
    except (RuntimeError, ValueError):  # what has to see weights: it is refused, or not, later
        return None
    its.use_dora = config.use_dora
    return adapted  # pyright: ignore[reportReturnType]
