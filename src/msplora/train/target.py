"""The device a run is to fit on: one that is here, or one that is only named."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil
import torch

from msplora.errors import ConfigError, nearest

from .trainer_arguments import has_accelerator

GIB = 2**30

CUDA_CONTEXT = GIB // 2
"""What the driver, the context and loaded kernels take of a GPU: assumed, not measured."""

CUBLAS_WORKSPACE = 32 * 2**20
"""What cuBLAS asks PyTorch's allocator for, on the largest cards; 8 MiB on most."""

CUDA_SLACK = 0.05
"""The share by which PyTorch's allocator reserves more than it hands out: assumed. It is counted
on what comes and goes, not on the weights."""

CPU_SLACK = 0.25
"""The share of what comes and goes that a process on the CPU takes beside its tensors."""

CPU_LIBRARIES = 256 * 2**20
"""And what libraries take when they are first used. With both, the fifteen processes
of benchmarks/results/dry-run.jsonl would have fitted, the tightest with 75 MiB to spare.
The same processes on another machine took up to 308 MiB less."""

# GiB that PyTorch finds on them, rounded down: less than they are sold with, since firmware and
# error correction take a part. By the names they go by.
_CARDS = {
    "T4": 14.5, "V100": 31.7, "P100": 15.8, "A10": 22, "A10G": 22, "A30": 23.4, "A40": 44.3,
    "L4": 22, "L40": 44.3, "L40S": 44.3, "A6000": 47.4, "A100-40": 39.3, "A100": 79.1,
    "A100-80": 79.1, "H100": 79.1, "H200": 139.7, "B200": 178.3, "RTX3060": 11.7, "RTX3090": 23.5,
    "RTX4080": 15.6, "RTX4090": 23.5, "RTX5090": 31.3,
}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GI?B?|MI?B?)", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """A device, and the bytes that a run may take of it."""

    name: str
    on_gpu: bool
    capacity: int
    here: bool
    """It is the device that a run on this machine would train on."""

    def overhead(self, total: int, weights: int) -> int:
        """What is taken beside the tensors, of which `weights` bytes stay where they are."""
        if not self.on_gpu:
            return CPU_LIBRARIES + int(CPU_SLACK * (total - weights))
        return CUDA_CONTEXT + CUBLAS_WORKSPACE + int(CUDA_SLACK * (total - weights))


def find_target(asked: str | None) -> Target:
    """The device that was asked for, or the one that a run would train on.

    Args:
        asked: "cpu", "cuda", "cuda:1", a size such as "24GB" (of a GPU), a card such as "H100", or
            "cpu:16GB".

    Raises:
        ConfigError: there is no such device here, and its name says no size.
    """
    if asked is None:
        return _gpu_here(0) if torch.cuda.is_available() else _cpu_here()
    name = asked.strip()
    if name.lower() == "cpu":
        return _cpu_here()
    if found := re.fullmatch(r"cuda(?::(\d+))?", name.lower()):
        number = int(found[1] or 0)
        if number >= torch.cuda.device_count():
            raise ConfigError(
                f"--device {asked}: this machine has {torch.cuda.device_count() or 'no'} GPU(s) "
                f"that PyTorch can use. Name a size instead, as in --device 24GB."
            )
        return _gpu_here(number)
    if name.lower().startswith("cpu:") and (size := _size(name[4:])):
        return Target(f"a machine with {name[4:].strip()} free", False, size, here=False)
    if size := _size(name):
        return Target(f"a GPU of {name}", True, size, here=False)
    card = re.sub(r"[\s_]", "", name.upper()).removeprefix("NVIDIA")
    if card in _CARDS:
        return Target(card, True, int(_CARDS[card] * GIB), here=False)
    raise ConfigError(
        f"--device {asked!r} is no device, no size and no card that is known."
        f"{nearest(card, _CARDS)} Use cpu, cuda, cuda:1, a GPU's size such as 24GB, or cpu:16GB."
    )


def _size(text: str) -> int | None:
    """Bytes that a run may take. Memory is sold in units of 1024: GB and GiB mean the same here."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        return None
    return int(float(found[1]) * (GIB if found[2].upper().startswith("G") else 2**20))


def _cpu_here() -> Target:
    free = psutil.virtual_memory().available
    return Target("this machine's free memory", False, free, here=not has_accelerator())


def _gpu_here(number: int) -> Target:
    free, _ = torch.cuda.mem_get_info(number)
    name = f"cuda:{number} ({torch.cuda.get_device_name(number)}), what is free of it"
    return Target(name, True, free, here=number == 0)
