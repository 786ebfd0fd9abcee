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
from msplora.page.environment import short
from msplora.same_source import same_source

from .base import Base
from .experts import in_order
from .on_disk import TensorsOnDisk
from .other_products import beside_the_product, other_product
from .reading_lora import lora_kinds
from .reading_pyramid import counted_kinds, planned_kinds
from .stored import StoredAdapter


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
    what = other_product(config)
    if what:
        raise UnsupportedError(
            f"{str(folder)!r} uses {what}: its update is not the product of the two factors in the "
            f"file. Adapters without it are analysed."
        )
    tensors = TensorsOnDisk(folder)
    found = Base(base, config) if base and base.source else None
    if found is not None and getattr(config, "layer_replication", None):
        raise UnsupportedError(
            f"{str(folder)!r} repeats layers of its base (layer_replication), so that its weights "
            f"have other names than the base's files. Analyse it without --base."
        )
    is_pyramid = isinstance(config, MSPLoraConfig)
    if not is_pyramid:
        kinds, fingerprint = lora_kinds(tensors, config, found)
        levels: tuple[str, ...] = ("lora",)
    else:
        fingerprint = config.fingerprint
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
        kinds=in_order(kinds),
        notes=(
            *_notes(config, tensors, any(kind.counted for kind in kinds)),
            *_other_base(config, found),
        ),
        shapes={name: tuple(its.shape) for name, its in tensors.shapes.items() if _factor(name)},
        fingerprint=fingerprint,
    )
    return adapter, found


def _notes(config: Any, tensors: Iterable[str], counted: bool) -> list[str]:
    notes = []
    if counted:
        notes.append(
            "Without --base the layers are counted from the file: where the adapter skips blocks, "
            "layer 3 is the fourth that is adapted. They are laid beside another adapter's only "
            "where both adapt the same weights, or it is certain that none is skipped."
        )
    others = [key for key in tensors if not _factor(key)]
    if others:
        notes.append(
            f"{len(others)} more tensor(s) in the file, such as {others[0]}, are no low-rank "
            f"update and are not looked at: a head, biases or trained tokens."
        )
    return [*notes, *beside_the_product(config, tensors)]


def _other_base(config: Any, base: Base | None) -> list[str]:
    """That the base has another name than the one in the config: shapes that fit prove little."""
    named = config.base_model_name_or_path
    if base is None or not named or same_source(named, base.source):
        return []
    return [
        f"It names the base {short(named)}, and is measured against {short(base.source)}. Unless "
        f"these are one model in two places, relative norms and intruder dimensions are not those "
        f"of what was trained."
    ]


def _factor(name: str) -> bool:
    """Whether a tensor is of a low-rank update, and no head's, bias or token's."""
    return ".lora_" in name or ".msplora_" in name
