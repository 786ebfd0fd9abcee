"""What a GPU tells of a step beside its time: its peak memory and its kernel launches."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile

# Torch's profiler says on stderr when it starts and stops, in the middle of a progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_LAUNCH = re.compile("Launch(Cooperative)?Kernel")


class TooFullError(RuntimeError):
    """Memory was so full that times cannot be compared."""


def gpu_figures(step: Callable[[], object], kept: int) -> dict[str, int]:
    """Figures of a speed row on a GPU, of steps that are not on the clock.

    Args:
        step: takes one.
        kept: the bytes that the step's method holds from step to step.
    """
    own = peak_gpu_bytes(step)
    found = {"peak_live_bytes": kept + own, "step_live_bytes": own}
    count = kernel_launches(step)
    return found | ({"kernel_launches": count} if count else {})  # none: it was not let see them


def allocation_retries(device: str) -> int:
    """How often the allocator has had to give back what it had reserved, and ask again."""
    return torch.cuda.memory_stats()["num_alloc_retries"] if device == "cuda" else 0


def peak_gpu_bytes(step: Callable[[], object]) -> int:
    """The most bytes that tensors hold during a step, above those that are alive before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kernel_launches(step: Callable[[], object]) -> int:
    """How many kernels a step launches: torch's own, those of its libraries, and compiled ones."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    return launches((event.key, event.count) for event in profiled.key_averages())


def launches(calls: Iterable[tuple[str, int]]) -> int:
    """Count what launches a kernel among (name of a call into the runtime or driver, count)."""
    # cudaLaunchKernel, cudaLaunchKernelExC, cuLaunchKernel, cuLaunchCooperativeKernel …
    return sum(count for name, count in calls if _LAUNCH.search(name))
