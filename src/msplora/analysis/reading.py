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
from msplora.config_file import lora_or_pyramid
from msplora.errors import UnsupportedError
from msplora.loading import BaseOptions

from .base import Base
from .on_disk import TensorsOnDisk
from .reading_lora import lora_kinds
from .reading_pyramid import counted_kinds, planned_kinds
from .stored import StoredAdapter

_REWRITES_THE_BASE = ("pissa", "olora", "eva", "corda", "loftq", "lora_ga", "mica")
_OTHER_PRODUCTS = {
    "use_dora": "DoRA, which also rescales the base's weights",
    "use_qalora": "QALoRA, which pools a layer's inputs before A reads them",
    "use_bdlora": "BD-LoRA, whose A or B is stored as the blocks on its diagonal",
}


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
        AdapterFileError: the file or its config is damaged, or tensors are missing, left over or
            misshapen.
        UnsupportedError: an adapter of another method, or one that does more than add B A.
        BaseModelError: the base cannot be read, or is not the adapter's.
    """
    config = lora_or_pyramid(folder, "analysed")
    for name, what in _OTHER_PRODUCTS.items():
        if getattr(config, name, None):
            raise UnsupportedError(
                f"{str(folder)!r} uses {what}: its update is not the product of the two factors in "
                f"the file. Adapters without it are analysed."
            )
    tensors = TensorsOnDisk(folder)
    found = Base(base, config) if base and base.source else None
    is_pyramid = isinstance(config, MSPLoraConfig)
    if not is_pyramid:
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
        method="MSPLoRA" if is_pyramid else "LoRA",
        base=config.base_model_name_or_path or None,
        levels=levels,
        kinds=kinds,
        notes=tuple(_notes(config, tensors, any(kind.counted for kind in kinds))),
    )
    return adapter, found


def _notes(config: Any, tensors: Iterable[str], counted: bool) -> list[str]:
    notes = []
    if counted:
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
    biases = [key for key in tensors if key.endswith(".lora_B.bias")]
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
    init = str(config.init_lora_weights).lower()
    if init.startswith(_REWRITES_THE_BASE):
        notes.append(
            f"It was started with init_lora_weights={config.init_lora_weights!r}, which takes a "
            f"part out of the base's weights and puts it into B A: unless it was converted on "
            f"saving, what is shown is not the change from the original model."
        )
    return notes
