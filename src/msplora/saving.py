"""What is saved of an adapter is all of it: a state dict that holds it by halves is refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import AdapterFileError
from .store import Store, listed

Shapes = Mapping[str, tuple[int, ...] | None]
"""The name of a tensor in the model's state dict -> its shape, whole; `None` where that is open."""

_GATHER = (
    "A factor that is empty or flat is one process's share of it (ZeRO-3, FSDP): gather the whole "
    "first, as accelerator.get_state_dict(model) does, and pass that as state_dict."
)
_WHOLE = (
    "Levels that are frozen, for good or for a stage, are missing where a state dict leaves out "
    "what does not train (DeepSpeed's exclude_frozen_parameters, by which transformers' Trainer "
    "saves under ZeRO-3): pass the whole state dict."
)


def shapes_in(model: nn.Module, adapter_name: str) -> Shapes:
    """The names and the shapes of one adapter's pairs, and DoRA's magnitudes."""
    return {
        f"{path.replace('_fsdp_wrapped_module.', '')}.{name}": shape
        for path, module in model.named_modules()
        if isinstance(module, Store)
        for name, shape in module.shapes(adapter_name).items()
    }


def tensors_to_save(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a state dict of the whole model holds of one adapter's pairs, and DoRA's magnitudes.

    Raises:
        AdapterFileError: it lacks some of them, or holds shares of them.
    """
    shapes = shapes_in(model, adapter_name)
    found = {key: tensor for key, tensor in state_dict.items() if key in shapes}
    if not state_dict or _is_another_process():
        return found  # which nobody writes
    if shapes and not found and not _trains(model, adapter_name):
        # TRL's frozen copy of an adapter, its reference: the run needs no file of it.
        warnings.warn(
            f"adapter {adapter_name!r} does not train, and the state dict to save it from leaves "
            f"out what does not: there is nothing in its file. {_WHOLE}",
            stacklevel=2,
        )
        return found
    shares = [
        f"{key} has shape {tuple(tensor.shape)}, and not {shapes[key] or 'that of the whole'}"
        for key, tensor in found.items()
        if not tensor.numel() or shapes[key] not in (None, tuple(tensor.shape))
    ]
    missing = [f"{key} is missing" for key in shapes if key not in found]
    if shares or missing:
        advice = [*([_GATHER] if shares else []), *([_WHOLE] if missing else [])]
        raise AdapterFileError(
            f"the state dict to save adapter {adapter_name!r} from does not hold all of it "
            f"({len(shares) + len(missing)} problem(s)); its file was not written:\n"
            f"{listed(shares + missing)}\n{' '.join(advice)}"
        )
    return found


def _trains(model: nn.Module, adapter_name: str) -> bool:
    return any(
        parameter.requires_grad
        for store in model.modules()
        if isinstance(store, Store)
        for held in store.of_adapter(adapter_name)
        for parameter in held.parameters()
    )


def _is_another_process() -> bool:
    """Whether this is not the first of several: what is gathered, the others are not given."""
    distributed = torch.distributed
    return (
        distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0
    )
