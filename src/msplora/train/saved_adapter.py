"""A saved adapter: put on its base again, whole, and written; what of it has to be float32."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from msplora import sisters
from msplora.errors import AdapterFileError, MSPLoraError
from msplora.loading import open_tensors

from .adalora import is_adalora, leave_penalty_out


def load_adapter(model: nn.Module, folder: Path, is_trainable: bool = False) -> Any:
    """Put a saved adapter on its base; all of it must be there and fit.

    Raises:
        MSPLoraError: a tensor of the adapter, or of its head, is missing or misshapen.
    """
    sisters.register()  # before PEFT looks the adapter's type up
    try:
        with warnings.catch_warnings():
            # PEFT only warns of tensors that a LoRA's file lacks, and leaves them random.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            if is_trainable:  # a run says it itself, of every method
                warnings.filterwarnings("ignore", message="the adapter names")
            loaded = peft.PeftModel.from_pretrained(
                model, str(folder), is_trainable=is_trainable, low_cpu_mem_usage=on_meta(model)
            )
        if is_adalora(loaded):
            leave_penalty_out(loaded)
        if to_float32(loaded) and not on_meta(loaded):  # what was rounded is read again
            tensors = peft.utils.save_and_load.load_peft_weights(str(folder), device="cpu")
            peft.set_peft_model_state_dict(loaded, tensors)
        return loaded
    except MSPLoraError:
        raise
    except (RuntimeError, ValueError, UserWarning) as error:
        raise AdapterFileError(
            f"the adapter {folder} does not fit {type(model).__name__}: "
            f"{' '.join(str(error).split())[:400]} Use the base and the "
            f"classes it was trained with."
        ) from error


def save_trained(model: Any, folder: Path, state_dict: dict[str, Any] | None = None) -> None:
    """Save a model, without the second adapter that dpo compares with.

    `state_dict` holds its weights where the model itself has only a share of them.
    """
    adapters: dict[str, Any] = {}
    if isinstance(model, peft.PeftModel):
        adapters["selected_adapters"] = ["default"]
    model.save_pretrained(str(folder), state_dict=state_dict, **adapters)


def adapter_numbers(folder: Path, prefix: str) -> int:
    """How many numbers a saved adapter has, without what trained whole beside it.

    Args:
        folder: of the adapter.
        prefix: of its method, which PEFT gives the names of its tensors.

    Raises:
        AdapterFileError: there is no file, or it is cut short.
    """
    with open_tensors(folder) as opened:
        return sum(
            math.prod(opened.get_slice(name).get_shape())
            for name in opened.keys()  # noqa: SIM118
            if f".{prefix}" in name
        )


def to_float32(model: nn.Module) -> bool:
    """Bring what trains, and what is saved of the base's modules, to float32; whether any was not.

    PEFT does so for the factors, and copies whole modules as they are: in half precision the small
    steps of an optimiser would be lost.
    """
    half = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dtype in (torch.float16, torch.bfloat16)
        and (parameter.requires_grad or ".modules_to_save." in name)
    ]
    for parameter in half:
        parameter.data = parameter.data.float()
    return bool(half)


def on_meta(model: nn.Module) -> bool:
    """Whether the model has no numbers, as in a dry run; its adapter needs none either."""
    return next(model.parameters()).is_meta
