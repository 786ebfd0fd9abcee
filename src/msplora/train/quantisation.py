"""A frozen base in 4 or 8 bits (QLoRA), and checkpoints that are quantised already."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import peft
import torch
import transformers
from torch import nn

from msplora.errors import ConfigError
from msplora.extras import quantised_extra

from .peft_methods import METHODS_IN_BITS
from .settings import Settings


def quantisation_config(
    settings: Settings, config: Any, arithmetic: torch.dtype, whole: tuple[str, ...]
) -> transformers.BitsAndBytesConfig | None:
    """Return how to quantise the base while it is loaded, or None where nothing is to be done.

    Args:
        config: the model's, which says whether its weights are quantised already.
        whole: modules to leave as they are, as they train; empty leaves out the output layer.

    Raises:
        ConfigError: the weights are quantised already, and cannot be again or cannot train.
        MSPLoraError: bitsandbytes is not installed.
    """
    already = getattr(config, "quantization_config", None)
    if already is not None:
        kind = quantised_by(already)
        if settings.quantization:
            raise ConfigError(
                f"quantization = {settings.quantization!r}, but the weights of {settings.model} "
                f"are quantised already ({kind}). Leave quantization out, or name the checkpoint "
                f"they were made from."
            )
        if settings.method not in METHODS_IN_BITS:
            raise ConfigError(
                f"the weights of {settings.model} are quantised ({kind}), and msplora trains on "
                f"such with method {', '.join(METHODS_IN_BITS)}; the method is "
                f"{settings.method!r}. Use one of those, or the checkpoint they were made from."
            )
    if not settings.quantization:
        return None
    with quantised_extra():  # transformers would say what to install, but not by whose extra
        importlib.import_module("bitsandbytes")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=settings.quantization == "4bit",
        load_in_8bit=settings.quantization == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=arithmetic,
        llm_int8_skip_modules=list(whole) or None,
    )


def can_be_quantised(settings: Settings) -> bool:
    """Whether `quantization` could be set for such a run, here."""
    return settings.method in METHODS_IN_BITS and bool(find_spec("bitsandbytes"))


def quantised_by(quantisation: Any) -> str:
    """The method, or the library, that a config's quantisation names."""
    asked = isinstance(quantisation, dict)
    method = quantisation.get("quant_method") if asked else quantisation.quant_method
    return str(getattr(method, "value", method or "an unknown method"))


def is_quantised(model: nn.Module) -> bool:
    """Whether the weights are in some quantised form, made here or found in the checkpoint."""
    return bool(getattr(model, "is_quantized", False))


def prepare_quantised(model: Any) -> Any:
    """Return the model frozen, and what is not rounded of it (norms, embeddings) in float32."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On such a CPU bitsandbytes packs the weights anew when they are first used without
            # gradients, for a kernel that has none: after an evaluation none would flow any more.
            module.support_avx512bf16_for_cpu = False
    # The trainer turns gradient checkpointing on where it is asked for, not reentrant: so the
    # inputs need no gradient, which is all that PEFT would do for it.
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


@contextmanager
def trained_in_float32(model: nn.Module) -> Iterator[None]:
    """Undo what TRL's trainers do as they are made: they round what trains on a quantised base.

    AdamW on bfloat16 weights loses every step below a 256th of a weight.
    """
    kept = {name: its.data for name, its in model.named_parameters() if its.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = kept[name]
