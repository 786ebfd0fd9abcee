"""The peak memory of a training step: the bytes that live tensors hold, and the resident set.

Of the live bytes most are the same in every method, so those that a step itself adds, above what
lives from step to step (weights, moments), are given too.

On a CPU every allocation and release of torch's allocator is read from torch's profiler. What the
kernels of other libraries allocate past it shows in the resident set only, which is measured in a
process of its own for each method: a process never gives back all it once took.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from msplora.errors import MSPLoraError

from .gpu_figures import peak_gpu_bytes
from .models import build_base
from .points import Point
from .results import Row
from .stepping import make_step

WARMUP = 2
"""Steps before: the first makes the optimiser's state, or compiles."""


def peak_live_bytes(step: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes that tensors hold during `step`, above those that are alive before it."""
    if device == "cuda":
        return peak_gpu_bytes(step)
    gc.collect()  # what is left of earlier work would else be let go during the step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = step()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    memory = [its for its in events if its.get("name") == "[memory]"]
    memory.sort(key=lambda its: (its["ts"], its["args"]["Ev Idx"]))
    return highest(its["args"]["Bytes"] for its in memory if its["args"]["Device Type"] == 0)


def highest(changes: Iterable[int]) -> int:
    """The highest that a sum gets, from 0, as changes are added to it."""
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak


def resident_bytes() -> int:
    """The most bytes of memory that this process has had at once."""
    # Linux passes `ru_maxrss` on from a parent to the program it starts; VmHWM it does not.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_memory(point: Point, method: str, device: str = "cpu") -> Row:
    """A method's row, with this process as the one whose resident set is read."""
    base = build_base(point, device)
    step = make_step(method, base, point, device)
    for _ in range(WARMUP):
        step()
    step()
    resident = resident_bytes()  # before the profiler takes memory of its own
    own = peak_live_bytes(step, device)
    return {
        **point.keys(),
        "method": method,
        "trainable": step.trainable,
        "peak_live_bytes": step.kept_bytes() + own,
        "step_live_bytes": own,
        "resident_bytes": resident,
    }


def measure_memory_apart(point: Point, method: str, device: str, threads: int) -> Row:
    """The same in a process of its own.

    Raises:
        MSPLoraError: that process failed, or was ended for want of memory.
    """
    asked = {"point": point.keys(), "method": method, "device": device, "threads": threads}
    ended = subprocess.run(
        [sys.executable, "-m", "msplora.bench.memory", json.dumps(asked)],
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        said = ended.stderr.strip().splitlines()
        reason = said[-1] if said else f"it ended with {ended.returncode}, as for want of memory"
        raise MSPLoraError(f"{method} at {point} could not be measured: {reason}")
    return json.loads(ended.stdout.splitlines()[-1])


def _main() -> None:
    asked: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    row = measure_memory(Point(**asked["point"]), asked["method"], asked["device"])
    print(json.dumps(row))


if __name__ == "__main__":
    _main()
