"""Whether the disk has room for what a run writes, asked before the run is begun."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from msplora.errors import MSPLoraError

from .job import Job

_IN_EIGHT_BITS, _BLOCK = 4096, 256
"""bitsandbytes keeps tensors of so many numbers or more in 8 bits, with a scale for each block."""


class DiskTooSmall(MSPLoraError):
    """Not even one checkpoint fits on the disk."""


def check_space(job: Job, output: Path) -> list[str]:
    """Return a note where the checkpoints that are kept may not fit.

    A checkpoint holds what is saved (the adapter, or the whole model) and what the optimiser keeps.

    Raises:
        DiskTooSmall: there is no room for one checkpoint and the result.
    """
    model, settings = job.adapted.model, job.record.settings
    result = saved_bytes(model)
    checkpoint = result + optimiser_bytes(model, settings.training.optimizer)
    free = _free(output)
    if free < checkpoint + result:
        raise DiskTooSmall(
            f"a checkpoint takes about {_size(checkpoint)} and the result {_size(result)}, and "
            f"{free_space(output)} Name an output on another disk."
        )
    # The newest ones, the best one, and the one that is being written.
    kept = settings.training.save_limit + 2
    if free < kept * checkpoint + result:
        return [
            f"up to {kept} checkpoints of about {_size(checkpoint)} are there at once, and "
            f"{free_space(output)} Lower training.save_limit, or free some space meanwhile."
        ]
    return []


def saved_bytes(model: nn.Module) -> int:
    """What the weights take in a file: of an adapter its tensors, else those of the whole model.

    More than what trains: VeRA and RandLoRA save their frozen projections, and what Lily's layers
    have in common is written for each of them.
    """
    if isinstance(model, PeftModel):
        # Not by `state_dict()`, in which quantised layers ask for numbers of their scales.
        named = dict(model.named_parameters(remove_duplicate=False))
        named |= dict(model.named_buffers(remove_duplicate=False))
        kept = get_peft_model_state_dict(model, state_dict=named)
        return sum(its.nbytes for its in kept.values())
    # Tied weights are in a file once.
    tensors = {id(its.untyped_storage()): its for its in model.state_dict().values()}
    return sum(its.nbytes for its in tensors.values())


def optimiser_bytes(model: nn.Module, optimizer: str) -> int:
    """What an optimiser keeps of all that trains, and of ElaLoRA's numbers two averages more.

    AdaLoRA's averages are in no file.

    Args:
        model: what trains.
        optimizer: as the settings name it.
    """
    return sum(
        _state_bytes(its, optimizer) + (2 * its.nbytes if ".elalora_" in name else 0)
        for name, its in model.named_parameters()
        if its.requires_grad
    )


def _state_bytes(parameter: Tensor, optimizer: str) -> int:
    if optimizer == "sgd":  # without momentum
        return 0
    if optimizer == "adafactor" and parameter.dim() > 1:  # means of rows and of columns
        *stack, outputs, inputs = parameter.shape
        return 4 * math.prod(stack) * (outputs + inputs)
    if optimizer == "adafactor":
        return parameter.nbytes
    if optimizer.endswith("8bit") and parameter.numel() >= _IN_EIGHT_BITS:
        blocks = -(-parameter.numel() // _BLOCK)
        return 2 * (parameter.numel() + 4 * blocks + 4 * 256)
    return 2 * parameter.nbytes  # AdamW's moments


def free_space(output: Path) -> str:
    """How much is free where `output` is to be, in a sentence."""
    return f"{_size(_free(output))} are free on the disk of {output.parent}."


def _free(output: Path) -> int:
    folder = output.parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
