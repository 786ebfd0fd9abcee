"""Checkpoints of the code that was published with the paper, and what that code computed of them.

That code (a copy of PEFT 0.5) adds to a layer only the pairs that were *created* in it. A pair that
a layer shares with another is stored with it and does not act: the global pair acts in block 0
alone, a mid pair in the first block of its group, the local pairs everywhere. Its groups are cut at
multiples of L / 3, and a block counts as the first of its group if it is less than 1 after the cut.
The scale is alpha_i / r_i, the ranks sorted downwards and the alphas as they were given.

So each layer is a LoRA of the pairs that act in it. Read, it becomes a pyramid of one level with a
pair for each layer, whose rank is the sum of all ranks; what does not act is zero in it.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from .config import MSPLoraConfig
from .errors import AdapterFileError, UnsupportedError
from .loading import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    BaseOptions,
    check_finite,
    class_names,
    load_base_of,
    read_tensors,
)
from .planning import plan
from .store import find_store, plan_of

PICKLE_FILE = "adapter_model.bin"
"""That code cannot write safetensors: they refuse tensors that are one and have several names."""

_GROUPS = 3
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])_(\d+)\.weight")
# The first release whose unpickler for weights cannot be made to run code (CVE-2025-32434).
_SAFE_TORCH = Version("2.6")


@dataclass(frozen=True)
class Checkpoint:
    """What a folder of that code holds."""

    config: dict[str, Any]
    pairs: dict[str, dict[int, tuple[Tensor, Tensor]]]
    """Module -> number of the level, the largest rank first -> A (r, in) and B (out, r)."""
    others: dict[str, Tensor]
    """What was trained besides pairs: a classifier's head."""

    @property
    def ranks(self) -> list[int]:
        """Of the levels: that code sorts them."""
        return sorted(self.config["r"], reverse=True)

    @property
    def scales(self) -> list[float]:
        """Of the levels: alphas, which that code does not sort, over sorted ranks."""
        alphas = self.config["lora_alpha"]
        return [alpha / rank for alpha, rank in zip(alphas, self.ranks, strict=False)]


def is_released(folder: Path) -> bool:
    """Whether an adapter's folder was written by the released code, which gives r as a list."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return config["peft_type"] == "MSPLORA" and isinstance(config["r"], list)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_released(
    folder: Path, base: BaseOptions | None = None
) -> tuple[PeftModel, dict[str, Tensor]]:
    """Load the base a checkpoint names and make it compute what the released code computed.

    Returns:
        The model, with a pyramid of one level, ready for inference; and the tensors that the file
        holds besides pairs, by the names PEFT saves them under.

    Raises:
        MSPLoraError: the checkpoint or its base cannot be read, or they do not fit.
    """
    found = read_checkpoint(folder)
    config = _own_pairs(found, sorted(found.pairs))
    model = load_base_of(config, found.others, base or BaseOptions(), class_names(folder))
    own = acting_pairs(found, {key: blocks_on(model, key) for key in found.pairs})
    targets = found.config.get("target_modules")
    named = _own_pairs(found, targets) if targets else config
    if _same_sites(model, named, found):
        config = named
    elif not _same_sites(model, config, found):
        raise AdapterFileError(
            f"{str(folder)!r} adapts modules such as {next(iter(found.pairs))!r}, which "
            f"{type(model).__name__} does not have as it is loaded here. Pass the base it was "
            f"trained on with --base."
        )
    named_base = config.base_model_name_or_path
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path.*was renamed")
        adapted: Any = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    config.base_model_name_or_path = named_base  # PEFT puts the path it was loaded from
    store = find_store(adapted)
    assert store is not None
    for pair in plan_of(adapted).pairs:
        for factor, tensor in zip(
            store.pair(pair.address, "default"), own[pair.sites[0]], strict=True
        ):
            _fill(factor.factor, tensor, pair.sites[0])
    state = get_peft_model_state_dict(adapted)
    left_over = sorted(set(found.others) - set(state))
    if left_over:
        raise AdapterFileError(
            f"{str(folder)!r} holds {left_over[0]!r}, for which {type(model).__name__} has no "
            f"place. Pass the base it was trained on with --base."
        )
    for key, tensor in found.others.items():
        if tensor.shape != state[key].shape:
            raise AdapterFileError(
                f"{str(folder)!r} holds {key!r} of shape {tuple(tensor.shape)}, and "
                f"{type(model).__name__} has {tuple(state[key].shape)}. Pass the base it was "
                f"trained on with --base."
            )
    set_peft_model_state_dict(adapted, state | found.others)
    return adapted.eval(), found.others


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's config and tensors, and refuse what that code could not have computed.

    Raises:
        AdapterFileError: it cannot be read, or is not what that code writes.
        UnsupportedError: it asks for something that is not read.
    """
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    _check_config(config, folder)
    pairs: dict[str, dict[int, dict[str, Tensor]]] = {}
    others = {}
    for name, tensor in _tensors(folder).items():
        match = _NAME.fullmatch(name)
        if match:
            by_level = pairs.setdefault(match[1], {})
            by_level.setdefault(int(match[3]), {})[match[2]] = tensor
        elif "lora_" in name:
            raise AdapterFileError(
                f"{str(folder)!r} holds {name!r}. The released code computes with pairs of linear "
                f"layers only, named …lora_A_<level>.weight."
            )
        elif ".original_module." not in name:  # the head as it was before training
            others[name] = tensor
    if not pairs:
        raise AdapterFileError(
            f"{str(folder)!r} holds no pair. The released code writes them where it has trained; "
            f"what it loads and saves again loses them."
        )
    ranks = sorted(config["r"], reverse=True)
    return Checkpoint(config, _paired(pairs, ranks, folder), others)


def created_levels(key: str, levels: int, blocks: int) -> tuple[int, ...]:
    """The levels whose pair the released code creates in a module, and so those that act in it.

    Args:
        key: the module's path.
        levels: how many there are, the most shared first.
        blocks: the length of the list of blocks it lies in; -1 outside of one.
    """
    return tuple(level for level in range(levels) if _creator(key, level, levels, blocks) == key)


def _creator(key: str, level: int, levels: int, blocks: int) -> str | None:
    """The module whose pair a level uses in the module `key`; `None` where there is no pair."""
    number = re.search(r"\d+", key)  # the first in the name, whatever it counts
    if number is None:
        return None
    block = int(number[0])
    if level == 0:
        return re.sub(r"\d+", "0", key, count=1)
    if level == levels - 1:
        return key
    start = 0.0
    for _ in range(_GROUPS):
        end = start + float(blocks) / _GROUPS
        if start <= block < end:
            return key if block - start < 1 else re.sub(r"\d+", str(int(start)), key, count=1)
        start = end
    return None


def blocks_on(model: nn.Module, key: str) -> int:
    """What the released code takes for the number of blocks: the length of what holds the first."""
    names = key.split(".")
    first = next((place for place, name in enumerate(names) if re.search(r"\d", name)), len(names))
    try:
        holder: Any = model.get_submodule(".".join(names[:first]))
    except AttributeError:
        return -1
    return len(holder) if hasattr(holder, "__len__") else -1


def acting_pairs(found: Checkpoint, blocks: Mapping[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """The update of each module as one pair of the summed rank, its scale in B: (R, in), (out, R).

    Raises:
        AdapterFileError: a pair is missing, or copies of one that is shared are not alike.
    """
    ranks, scales = found.ranks, found.scales
    own = {}
    for key, by_level in found.pairs.items():
        _check_copies(found, key, blocks[key])
        acting = created_levels(key, len(ranks), blocks[key])
        some_a, some_b = next(iter(by_level.values()))
        a = [some_a.new_zeros(rank, some_a.shape[1]) for rank in ranks]
        b = [some_b.new_zeros(some_b.shape[0], rank) for rank in ranks]
        for level in acting:
            a[level], b[level] = by_level[level][0], by_level[level][1].float() * scales[level]
        own[key] = torch.cat(a).float(), torch.cat([its.float() for its in b], 1)
    return own


def _check_copies(found: Checkpoint, key: str, blocks: int) -> None:
    """A pair has to be there where that code puts it, and the same in all layers that share it."""
    levels = len(found.ranks)
    for level in range(levels):
        creator = _creator(key, level, levels, blocks)
        here = found.pairs[key].get(level)
        there = found.pairs.get(creator or "", {}).get(level)
        if (creator is None) != (here is None) or (creator is not None and there is None):
            raise AdapterFileError(
                f"{key!r} has {'a' if here else 'no'} pair of level {level}; the released code, "
                f"with {blocks} blocks, takes it from {creator or 'nowhere'}. Is this the base it "
                f"was trained on?"
            )
        if here is None or there is None:
            continue
        if not all(map(torch.equal, here, there)):
            raise AdapterFileError(
                f"{key!r} and {creator!r} share a pair of level {level} in the released code (with "
                f"{blocks} blocks), but their copies differ. Is this the base it was trained on?"
            )


def _paired(
    pairs: Mapping[str, Mapping[int, Mapping[str, Tensor]]], ranks: Sequence[int], folder: Path
) -> dict[str, dict[int, tuple[Tensor, Tensor]]]:
    found: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for key, by_level in pairs.items():
        for level, factors in by_level.items():
            shapes = {name: tuple(its.shape) for name, its in factors.items()}
            fits = level < len(ranks) and set(factors) == {"A", "B"}
            if not fits or shapes["A"][0] != ranks[level] or shapes["B"][1] != ranks[level]:
                raise AdapterFileError(
                    f"{str(folder)!r}: the pair of level {level} in {key!r} has the shapes "
                    f"{shapes}, which do not fit the ranks {list(ranks)} of its config."
                )
            found.setdefault(key, {})[level] = factors["A"], factors["B"]
    return found


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    ranks, alphas = config["r"], config.get("lora_alpha")
    whole = ranks and all(isinstance(rank, int) and rank > 0 for rank in ranks)
    if not whole or not isinstance(alphas, list) or len(alphas) < len(ranks):
        raise AdapterFileError(
            f"{str(folder / CONFIG_FILE)!r} has r = {ranks} and lora_alpha = {alphas}; the "
            f"released code needs a rank above 0 and an alpha for each level."
        )
    if config.get("bias", "none") != "none":
        raise UnsupportedError(
            f"{str(folder)!r} was trained with bias = {config['bias']!r}. Biases of the released "
            f"code are not read: add them to the base, and convert with bias = 'none'."
        )


def _tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / PICKLE_FILE
    if (folder / WEIGHTS_FILE).is_file() or not file.is_file():
        return read_tensors(folder)
    if Version(torch.__version__.partition("+")[0]) < _SAFE_TORCH:
        raise UnsupportedError(
            f"{str(file)!r} is a pickle, which torch {torch.__version__} does not read safely; "
            f"install torch {_SAFE_TORCH} or newer."
        )
    try:
        # Tensors and containers only; anything else that a pickle can name is refused.
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise AdapterFileError(
            f"{str(file)!r} ({file.stat().st_size:,} bytes) cannot be read as weights: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(its, Tensor) for its in tensors.values()
    ):
        raise AdapterFileError(f"{str(file)!r} is no dictionary of tensors.")
    check_finite(tensors, str(file))
    return tensors


def _own_pairs(found: Checkpoint, targets: list[str] | str) -> MSPLoraConfig:
    """One pair for each layer, of the summed rank."""
    config, rank = found.config, sum(found.ranks)
    return MSPLoraConfig(
        levels=["own"],
        ranks=[rank],
        groups=[0],
        alphas=[rank],
        target_modules=targets,
        layers_to_transform=config.get("layers_to_transform"),
        layers_pattern=config.get("layers_pattern"),
        lora_dropout=config.get("lora_dropout", 0.0),
        fan_in_fan_out=config.get("fan_in_fan_out", False),
        modules_to_save=config.get("modules_to_save"),
        task_type=config.get("task_type"),
        auto_mapping=config.get("auto_mapping"),
        base_model_name_or_path=config.get("base_model_name_or_path"),
        revision=config.get("revision"),
        inference_mode=True,
    )


def _same_sites(model: nn.Module, config: MSPLoraConfig, found: Checkpoint) -> bool:
    try:
        return {site.key for site in plan(model, config).sites} == set(found.pairs)
    except ValueError:
        return False


@torch.no_grad()
def _fill(parameter: Tensor, tensor: Tensor, key: str) -> None:
    if tensor.shape != parameter.shape:
        raise AdapterFileError(
            f"a factor of {key!r} has shape {tuple(tensor.shape)}, this base needs "
            f"{tuple(parameter.shape)}. Pass the base it was trained on with --base."
        )
    parameter.copy_(tensor)
