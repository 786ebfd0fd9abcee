"""Hot swapping: put a saved adapter in the place of a loaded one, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from .config import MSPLoraConfig
from .errors import AdapterFileError, MSPLoraError, UnsupportedError
from .finite import is_finite
from .forms import WRAPPED
from .injecting import check_type
from .layer import PyramidLayer
from .loading import adapter_folder, read_config, read_tensors
from .planning import plan
from .store import B, factors, find_store, name_in_file, raise_for

# What must be alike for one adapter's tensors to have their places in the other.
_ALIKE = ("use_dora", "bias", "modules_to_save", "trainable_token_indices")


def hotswap(model: nn.Module, source: str | Path, adapter_name: str = "default") -> None:
    """Replace the numbers of a loaded adapter by those of a saved one, in place.

    No layer is touched and every parameter stays the same object, so that a compiled model is not
    compiled again. The saved adapter must have the same sites, levels, groups and ranks; where its
    alphas differ, the difference goes into B, since the scales in the layers stay.

    Args:
        model: a `PeftModel` (or a model with an injected adapter).
        source: the folder of the saved adapter, or of its run.
        adapter_name: the loaded adapter to replace.

    Raises:
        AdapterFileError: the saved adapter cannot be read, differs in more than its numbers, was
            made for a base of another type, or its file holds what the loaded one has not (other
            embeddings); the loaded one is then as it was.
        UnsupportedError: the saved adapter is not MSPLoRA's, or the loaded one is merged.
        MSPLoraError: the model has no such adapter.
    """
    loaded = factors(model, adapter_name)
    folder = adapter_folder(Path(source))
    config = read_config(folder)
    if not isinstance(config, MSPLoraConfig):
        raise UnsupportedError(
            f"{str(folder)!r} is a {config.peft_type} adapter, not MSPLoRA; it cannot take the "
            f"place of {adapter_name!r}. Load it into a model of its own."
        )
    tensors = read_tensors(folder)
    _check_not_merged(model, adapter_name)
    check_type(model, config, config.model_type)
    store = find_store(model)
    assert store is not None  # `factors` found the adapter in it
    here, there = store.plans[adapter_name], plan(model, config)
    differing = [
        its.address
        for ours, its in zip(here.pairs, there.pairs, strict=False)
        if (ours.address, ours.rank, ours.sites) != (its.address, its.rank, its.sites)
    ]
    if differing or len(here.pairs) != len(there.pairs):
        raise AdapterFileError(
            f"the adapter in {str(folder)!r} has {len(there.pairs)} pairs on {len(there.sites)} "
            f"sites, {adapter_name!r} has {len(here.pairs)} on {len(here.sites)}, and they are not "
            f"the same{f', such as {differing[0]!r}' if differing else ''}. Only an adapter of the "
            f"same sites, levels, groups and ranks can be swapped in; use load_adapter."
        )
    _check_alike(model, adapter_name, config, folder)
    for pair in there.pairs:
        ratio = pair.scale / loaded[pair.address][2]
        if ratio != 1:
            # One that is missing is reported when the tensors are loaded.
            for key in tensors:
                if key.endswith("." + name_in_file(pair.address, B)):
                    tensors[key] = tensors[key] * ratio
    tensors = _named_as_loaded(model, adapter_name, tensors)
    with torch.no_grad():
        set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)


def _named_as_loaded(
    model: Any, adapter_name: str, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A file's tensors by the names of the loaded ones, which have no prefix without a `PeftModel`.

    Refused is a file that would be put in by halves: PEFT copies a head before it sees the pairs.
    """
    problems = []
    held, embeddings = (
        get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=too)
        for too in (False, True)
    )
    names = {key.removeprefix(WRAPPED): key for key in embeddings}
    named = {names.get(key.removeprefix(WRAPPED), key): its for key, its in tensors.items()}
    for key in named.keys() - held.keys():
        # The base's own embeddings, which PEFT saves beside an adapter, may stand in the file.
        found, its = named.pop(key), embeddings.get(key)
        if its is None or not torch.equal(found.to(its), its):
            problems.append(
                f"{key} is in the file and would take the place of the base's own"
                if its is not None
                else f"{key} is in the file and not in the loaded adapter"
            )
    for key, loaded in held.items():
        found = named.get(key)
        if found is None:
            problems.append(f"{key} is missing")
        elif found.shape != loaded.shape:
            shapes = tuple(found.shape), tuple(loaded.shape)
            problems.append(f"{key} has shape {shapes[0]}, the loaded adapter has {shapes[1]}")
        elif not is_finite(found):
            problems.append(f"{key} holds values that are not finite")
    raise_for(problems)
    return named


def _check_not_merged(model: nn.Module, adapter_name: str) -> None:
    for path, module in model.named_modules():
        layer: Any = module
        if isinstance(module, PyramidLayer) and adapter_name in layer.merged_adapters:
            raise UnsupportedError(
                f"adapter {adapter_name!r} is merged into {path!r}: new numbers would not reach "
                f"the merged weights. Call unmerge_adapter() first."
            )


def _check_alike(model: nn.Module, adapter_name: str, config: MSPLoraConfig, folder: Path) -> None:
    configs: Any = getattr(model, "peft_config", None)
    if configs is None:
        raise MSPLoraError(
            f"this {type(model).__name__} does not know the config of its adapter {adapter_name!r} "
            f"(no peft_config). Pass the PeftModel, or the model that the adapter was injected in."
        )
    for name in _ALIKE:
        ours, its = (_plain(getattr(one, name, None)) for one in (configs[adapter_name], config))
        if ours != its:
            raise AdapterFileError(
                f"{name} is {its!r} in {str(folder)!r} and {ours!r} in {adapter_name!r}; it must "
                f"be the same for a hot swap. Use load_adapter."
            )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (list, set, tuple)) else value or None
