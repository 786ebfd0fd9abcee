"""What an adapter does that is not adding s·BA to a weight: said of every one of its figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msplora.rewritten_base import rewrites_the_base

_OTHER_PRODUCTS = {
    "use_dora": "DoRA, which also rescales the base's weights",
    "use_qalora": "QALoRA, which pools a layer's inputs before A reads them",
    "use_bdlora": "BD-LoRA, whose A or B is stored as the blocks on its diagonal",
    "kasa_config": "KaSA, which puts a diagonal between B and A and cuts the base's weights",
    "monteclora_config": "MonteCLoRA, which adds samples around A and B",
}
_BIAS = ".lora_B.bias"
_FOR_TRAINING = ".lora_velora_embed"
"""VeLoRA's projection of what is kept of an input for the backward pass: its update is s·BA."""


def other_product(config: Any) -> str | None:
    """The method by which a LoRA's update is not the product of the factors in its file."""
    found = (what for name, what in _OTHER_PRODUCTS.items() if getattr(config, name, None))
    return next(found, None)


def beside_the_product(config: Any, tensors: Iterable[str]) -> list[str]:
    """In sentences, what else acts, and what the product stands for.

    Args:
        config: PEFT's.
        tensors: the names of those in the file.
    """
    notes = []
    biases = [name for name in tensors if is_bias(name)]
    if biases:
        notes.append(
            f"It adds a bias beside s·BA in {len(biases)} weight(s) (lora_bias), such as "
            f"{biases[0]}: these are not looked at."
        )
    if getattr(config, "alora_invocation_tokens", None):
        notes.append(
            "It is an activated LoRA (alora_invocation_tokens): what is shown acts from these "
            "tokens on, and before them the model is the base."
        )
    if rewrites_the_base(config):
        notes.append(
            f"It was started with init_lora_weights={config.init_lora_weights!r}, which takes a "
            f"part out of the base's weights and puts it into B A: unless it was converted on "
            f"saving, what is shown is not the change from the original model."
        )
    return notes


def is_beside_the_product(name: str) -> bool:
    """Whether a tensor of a LoRA's file leaves its product what it is."""
    return name.endswith((".bias", _FOR_TRAINING))


def is_bias(name: str) -> bool:
    """Whether a tensor of the file is the bias beside a B."""
    return name.endswith(_BIAS)
