"""From an adapter's folder to what its file holds, without loading a model.

A pyramid's file names its pairs and not the weights that borrow them. With the base the plan says
which they are; else they are counted from the pairs of a level that has one per layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msplora  # noqa: F401  (makes the adapter's type known to PEFT)
from msplora.config import MSPLoraConfig
from msplora.errors import UnsupportedError
from msplora.loading import BaseOptions, read_config

from .base import Base
from .on_disk import TensorsOnDisk
from .reading_lora import lora_kinds
from .reading_pyramid import counted_kinds, planned_kinds
from .stored import StoredAdapter

_REWRITES_THE_BASE = ("pissa", "olora", "eva", "corda", "loftq", "lora_ga", "mica")


def read_adapter(
    folder: Path, base: BaseOptions | None = None
) -> tuple[StoredAdapter, Base | None]:
    """Read an MSPLoRA adapter or a plain LoRA as PEFT saves it.

    Args:
        folder: the one that holds adapter_config.json.
        base: the base model, where it is to be looked at.

    Returns:
        The adapter, and its base where `base` names one.

    Raises:
        AdapterFileError: the file is damaged, or tensors are missing, left over or misshapen.
        UnsupportedError: an adapter of another method, or one that does more than add B A.
        BaseModelError: the base cannot be read, or is not the adapter's.
    """
    config: Any = read_config(folder)
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if method not in ("LORA", "MSPLORA"):
        raise UnsupportedError(
            f"{str(folder)!r} is a {method} adapter. What is analysed are the updates s B A of "
            f"LORA and MSPLORA."
        )
    if config.use_dora:
        raise UnsupportedError(
            f"{str(folder)!r} uses DoRA, which also rescales the base's weights: its update is not "
            f"the product of two factors. Adapters without DoRA are analysed."
        )
    tensors = TensorsOnDisk(folder)
    found = Base(base, config) if base and base.source else None
    if not isinstance(config, MSPLoraConfig):
        kinds = lora_kinds(tensors, config, found)
        levels: tuple[str, ...] = ("lora",)
    else:
        levels = tuple(level.name for level in config.pyramid)
        if found is not None:
            kinds = planned_kinds(tensors, config, found)
        else:
            kinds = counted_kinds(tensors, config)
    adapter = StoredAdapter(
        path=folder,
        method="MSPLoRA" if method == "MSPLORA" else "LoRA",
        base=config.base_model_name_or_path or None,
        levels=levels,
        kinds=kinds,
        notes=tuple(_notes(config, tensors, counted=found is None and method == "MSPLORA")),
    )
    return adapter, found


def _notes(config: Any, tensors: Iterable[str], counted: bool) -> list[str]:
    notes = []
    if counted and not config.layers_to_transform:
        notes.append(
            "Without --base the layers are counted from the file, and are laid beside another "
            "adapter's only where that has no gaps: where the adapter skips blocks, "
            "layer 3 is the fourth that is adapted."
        )
    others = [key for key in tensors if ".lora_" not in key and ".msplora_" not in key]
    if others:
        notes.append(
            f"{len(others)} more tensor(s) in the file, such as {others[0]}, are no low-rank "
            f"update and are not looked at: a head, biases or trained tokens."
        )
    init = str(config.init_lora_weights).lower()
    if init.startswith(_REWRITES_THE_BASE):
        notes.append(
            f"It was started with init_lora_weights={config.init_lora_weights!r}, which takes a "
            f"part out of the base's weights and puts it into B A: unless it was converted on "
            f"saving, what is shown is not the change from the original model."
        )
    return notes
