"""What the sisters' configs have in common: fields of LoRA's that a sister does not read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from peft import LoraConfig

from msplora.errors import ConfigError, UnsupportedError

COMMON = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "init_lora_weights",
)
"""The fields of LoRA's config that every sister reads."""


def refuse_the_rest(config: LoraConfig, name: str, reads: Collection[str] = COMMON) -> None:
    """Refuse what PEFT's LoRA offers and this method does not read, if it was asked for.

    Raises:
        UnsupportedError: it was.
    """
    for field in dataclasses.fields(LoraConfig):
        if field.name in reads:
            continue
        value = getattr(config, field.name)
        neutral = [None, field.default]
        if field.default_factory is not dataclasses.MISSING:
            neutral.append(field.default_factory())
        if not any(value is its or value == its for its in neutral):
            raise UnsupportedError(
                f"{name} does not support {field.name}={value!r}, which is plain LoRA's. Leave it "
                f"out."
            )
    if config.init_lora_weights not in (True, False):
        raise UnsupportedError(
            f"{name} does not support init_lora_weights={config.init_lora_weights!r}: use True (it "
            f"starts equal to the base) or False (it starts from random numbers, for tests)."
        )
    dropout: Any = config.lora_dropout
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ConfigError(f"lora_dropout = {dropout!r}: a probability from 0 to below 1.")


def check_whole(name: str, value: Any, at_least: int = 1) -> None:
    """Refuse what is no whole number, or a smaller one.

    Raises:
        ConfigError: it is.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ConfigError(f"{name} = {value!r}: a whole number, {at_least} or more.")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is no finite number above 0.

    Raises:
        ConfigError: it is.
    """
    if not is_number(value) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name} = {value!r}: a finite number above 0.")


def is_number(value: object) -> bool:
    """Whether it is a number that is no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
