"""What a step costs on one GPU: time, tokens per second, peak memory, kernel launches.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json

Llama-3.2-3B and Llama-2-7B with random weights in bfloat16, query and value or all linear layers,
eager and compiled; batches that fill the card. The points come in the order of their importance,
each gets as many rounds as its share of the time allows, and the file is written after each. What
there was no time for is named at the end. `--tiny` goes the same way on a CPU, with tiny models.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from msplora.bench.fits import available_bytes, need_of
from msplora.bench.methods import DEFAULT, NEEDED, checked
from msplora.bench.points import DTYPES, Point
from msplora.bench.results import ResultFile, check
from msplora.bench.speed import measure_speed
from msplora.bench.sweep import is_out_of_memory
from msplora.bench.terminal import time_table
from msplora.errors import MSPLoraError


@dataclass(frozen=True)
class Wanted:
    """A point whose batch is still to be chosen, and the time that it takes."""

    point: Point
    least: float = 25.0
    """Seconds below which it is not begun: to build it, warm up and step a few times."""
    share: float = 1.0
    """Of the time left, relative to the points after it."""
    fill: bool = True
    """Take the largest batch that fits; else the point's own."""


@dataclass(frozen=True)
class Plan:
    """What is measured on a kind of device, and how."""

    device: str
    wanted: list[Wanted]
    most_rows: int
    rounds: tuple[int, int]
    """At least and at most."""
    warmup: int
    backend: str = "inductor"


class OutOfTimeError(Exception):
    """The clock has run out within a point."""


def gpu_plan(dtype: str) -> Plan:
    """The points of a GPU. Compiled ones have 8 layers, since compiling takes time per layer."""

    def llama(
        name: str, layers: int, targets: str, compiled: bool = False, batch: int = 1
    ) -> Point:
        return Point(name, layers, targets, dtype, batch, 1024, compiled=compiled)

    small, large = ("llama-3.2-3b", 28), ("llama-2-7b", 32)
    eager = [
        Wanted(llama(*shape, targets))
        for shape in (small, large)
        for targets in ("qv", "all-linear")
    ]
    # Where a step is short, the time to launch its kernels shows.
    single = [Wanted(llama(*small, "qv"), least=15, share=0.5, fill=False)]
    compiled = [
        Wanted(llama(name, 8, targets, compiled=True), least=75, share=2)
        for targets in ("all-linear", "qv")
        for name, _ in (small, large)
    ]
    return Plan("cuda", [*eager, *single, *compiled], most_rows=64, rounds=(5, 60), warmup=3)


def tiny_plan(dtype: str) -> Plan:
    """The same road on a CPU; compiling stops after the graph, whose wholeness it shows."""
    points = [
        Wanted(Point("tiny-llama", 2, "qv", dtype, 1, 16), least=0),
        Wanted(Point("tiny-llama", 2, "all-linear", dtype, 1, 16), least=0, fill=False),
        Wanted(Point("tiny-llama", 1, "qv", dtype, 1, 16, compiled=True), least=0, share=2),
    ]
    return Plan("cpu", points, most_rows=2, rounds=(2, 3), warmup=1, backend="eager")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the time allows, and say what it did not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT))
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--force", action="store_true")
    given = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * given.minutes
    plan = (tiny_plan if given.tiny else gpu_plan)(given.dtype)
    try:
        methods = checked(given.methods, needed=NEEDED)
        check(given.output, append=given.append, force=given.force)
        if plan.device == "cuda" and not torch.cuda.is_available():
            raise MSPLoraError("there is no GPU that torch can use here; --tiny needs none.")
        file = ResultFile(
            given.output, "speed", append=given.append, force=given.force, device=plan.device
        )
    except MSPLoraError as error:
        parser.error(str(error))
    skipped = run(plan, methods, file, deadline, Console(soft_wrap=True, highlight=False))
    for said in skipped:
        print(f"skipped: {said}")


def run(
    plan: Plan, methods: Sequence[str], file: ResultFile, deadline: float, console: Console
) -> list[str]:
    """Measure the points one after the other, and return what was skipped, with the reasons."""
    skipped = []
    for place, wanted in enumerate(plan.wanted):
        started = time.monotonic()
        left = deadline - started
        if left < wanted.least or left <= 0:
            skipped.append(f"{wanted.point}: {max(left, 0):.0f} seconds are left")
            continue
        share = wanted.share / sum(its.share for its in plan.wanted[place:])
        try:
            point = filled(wanted, methods, plan)
            if file.holds(point.keys(), methods):
                continue
            rows = measure(plan, point, methods, started + left * share, deadline)
        except OutOfTimeError:
            skipped.append(f"{wanted.point}: the time ran out within it")
        except Exception as error:  # what fails at one point must not cost the others' time
            skipped.append(f"{wanted.point}: {type(error).__name__}: {first_line(error)}")
        else:
            file.add(rows)
            console.print(time_table(rows, str(point)))
            console.print(f"{time.monotonic() - started:.0f} seconds\n")
        finally:
            free()
    return skipped


def filled(wanted: Wanted, methods: Sequence[str], plan: Plan) -> Point:
    """The point with the largest batch that takes most of what is free."""
    if not wanted.fill:
        return wanted.point
    available = available_bytes(plan.device)
    for rows in range(plan.most_rows, 0, -1):
        point = replace(wanted.point, batch=rows)
        if available is None or need_of(point, methods, plan.device).total < 0.85 * available:
            return point
    raise MSPLoraError(f"{wanted.point} does not fit")


def measure(
    plan: Plan, point: Point, methods: Sequence[str], until: float, deadline: float
) -> list[dict]:
    """Measure a point, with half the batch if the estimate was wrong.

    Args:
        plan: the device, and how few and how many rounds.
        point: with its batch.
        methods: their names.
        until: when the point's share of the time is over.
        deadline: when all time is.
    """

    def watch() -> None:
        if time.monotonic() > deadline:
            raise OutOfTimeError

    def once(point: Point) -> list[dict]:
        return measure_speed(
            point,
            methods,
            rounds_until(until, plan.rounds),
            warmup=plan.warmup,
            device=plan.device,
            backend=plan.backend,
            on_step=watch,
        )

    try:
        return once(point)
    except RuntimeError as error:
        if not is_out_of_memory(error) or point.batch == 1:
            raise
    free()  # out of the handler, whose traceback holds the models
    return once(replace(point, batch=point.batch // 2))


def rounds_until(until: float, bounds: tuple[int, int]) -> Callable[[float], int]:
    """How many rounds of the length of the last fit until then."""
    fewest, most = bounds

    def rounds(last: float) -> int:
        return max(fewest, min(most, int((until - time.monotonic()) / last)))

    return rounds


def free() -> None:
    """Give back what the last point took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return (str(error).strip().splitlines() or [""])[0][:200]


if __name__ == "__main__":
    main()
