"""The time of a training step of every method at one point, side by side in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .gpu_figures import TooFullError, allocation_retries, gpu_figures
from .methods import NEEDED, checked
from .models import build_base
from .points import Point
from .results import Row
from .stepping import make_step
from .timing import figures, run_rounds


def measure_speed(
    point: Point,
    methods: Sequence[str],
    rounds: int | Callable[[float], int] = 60,
    *,
    warmup: int = 5,
    device: str = "cpu",
    backend: str = "inductor",
    on_step: Callable[[], object] = lambda: None,
    go_on: Callable[[int], bool] = lambda kept: True,
) -> list[Row]:
    """Return a row for each method, in the order of the table of methods.

    Args:
        point: what is measured.
        methods: names; `floor` and `lora` come along, since ratios are to them.
        rounds: see `run_rounds`.
        warmup: rounds of which nothing is kept; compiling happens there.
        device: "cpu" or "cuda".
        backend: of torch.compile, where the point is compiled.
        on_step: called after every step; what it raises ends the measurement.
        go_on: see `run_rounds`.

    Raises:
        TooFullError: a GPU's memory was so full that its allocator gave back and asked again, on
            the clock of whoever was stepping.
    """
    if point.compiled:
        torch.compiler.reset()  # what earlier points compiled is of no use here
    base = build_base(point, device)
    names = checked(methods, needed=NEEDED)
    steps = {name: make_step(name, base, point, device, backend) for name in names}
    before = 0

    def start(kept: int) -> bool:
        nonlocal before
        if not kept:
            before = allocation_retries(device)
        elif allocation_retries(device) > before:
            # At once: the rest of the rounds would be thrown away too.
            raise TooFullError(f"{point} leaves the allocator of {device} too little room.")
        return go_on(kept)

    seconds = run_rounds(
        steps,
        rounds,
        warmup=warmup,
        synchronise=torch.cuda.synchronize if device == "cuda" else lambda: None,
        on_step=on_step,
        go_on=start,
    )
    if allocation_retries(device) > before:
        raise TooFullError(f"{point} leaves the allocator of {device} too little room.")
    rows = []
    for name, step in steps.items():
        row: dict[str, Any] = {
            **point.keys(),
            "method": name,
            "trainable": step.trainable,
            "rounds": len(seconds[name]),
            **figures(seconds, name),
        }
        if device == "cuda":
            row["tokens_per_second"] = point.tokens / row["seconds"][1]
            row |= gpu_figures(step, step.kept_bytes())
        rows.append(row)
    return rows
