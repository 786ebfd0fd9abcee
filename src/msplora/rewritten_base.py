"""Starts of a LoRA that took a part out of the base's weights, which PEFT repeats at each loading.

`pissa` and `olora` come out the same each time. Others do not, and say nothing of it.
"""

from __future__ import annotations

from typing import Any

_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_OF_DATA = ("corda", "lora_ga")
CONVERT = (
    "Where it was trained, save it with PEFT's path_initial_model_for_weight_conversion: that "
    "makes it a LoRA of the base as it is."
)


class RewrittenBaseWarning(UserWarning):
    """The base that an adapter was trained on cannot be had again."""


def rewrites_the_base(config: Any) -> bool:
    """Whether an adapter acts beside less than the base's weights."""
    return _start_of(config).startswith(_STARTS)


def not_repeated(config: Any) -> str | None:
    """Why no loading gives the model that was trained, if none does.

    Args:
        config: PEFT's.
    """
    start = _start_of(config)
    said = f"It was started with init_lora_weights={start!r}, which takes a part out of the base's "
    if start.startswith("pissa_niter"):
        return (
            f"{said}weights by a random decomposition, at each loading another one: none gives "
            f"quite the model that was trained."
        )
    if start.startswith(_OF_DATA):
        return (
            f"{said}weights by what it saw of its data, and no loading does so again: beside the "
            f"whole base it is not the model that was trained."
        )
    return None


def _start_of(config: Any) -> str:
    return str(config.init_lora_weights).lower()
