"""What a step costs on one GPU: time, tokens per second, peak memory, kernel launches.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json

Llama-3.2-3B and Llama-2-7B with random weights in bfloat16, query and value or all linear layers,
eager and compiled; batches of 4, on which a minute is enough for a verdict, and those that fill the
card. The points come in the order of their importance, each gets as many rounds as its share of the
time allows, and the file is written after each. What there was no time for is named at the end, and
measured by the same command with --append; --only compiled measures the points of that name. A copy
without its history needs the commit in $COMMIT. `--tiny` goes the same way on a CPU, with tiny
models.
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
from msplora.bench.gpu_figures import TooFullError
from msplora.bench.methods import DEFAULT, NEEDED, checked
from msplora.bench.points import DTYPES, Point, point_of
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
    fill: bool = False
    """Take the largest batch that fits; else the point's own."""

    def __str__(self) -> str:
        return f"{self.point}{', filling the card' if self.fill else ''}"


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

    def llama(name: str, layers: int, targets: str, batch: int, compiled: bool = False) -> Point:
        return Point(name, layers, targets, dtype, batch, 1024, compiled=compiled)

    small, large = ("llama-3.2-3b", 28), ("llama-2-7b", 32)
    eager = [(shape, targets) for shape in (small, large) for targets in ("all-linear", "qv")]
    judged = [Wanted(llama(*shape, targets, 4), share=2) for shape, targets in eager]
    # Where a step is short, the time to launch its kernels shows.
    single = [Wanted(llama(*small, "qv", 1), least=15)]
    compiled = [
        Wanted(llama(name, 8, targets, 4, compiled=True), least=100, share=3)
        for targets in ("all-linear", "qv")
        for name, _ in (small, large)
    ]
    filling = [Wanted(llama(*shape, targets, 1), fill=True) for shape, targets in eager]
    wanted = [*judged, *single, *compiled, *filling]
    return Plan("cuda", wanted, most_rows=64, rounds=(5, 60), warmup=3)


def tiny_plan(dtype: str) -> Plan:
    """The same road on a CPU; compiling stops after the graph, whose wholeness it shows."""
    points = [
        Wanted(Point("tiny-llama", 2, "qv", dtype, 1, 16), least=0, fill=True),
        Wanted(Point("tiny-llama", 2, "all-linear", dtype, 1, 16), least=0),
        Wanted(Point("tiny-llama", 1, "qv", dtype, 2, 16, compiled=True), least=0, share=2),
    ]
    return Plan("cpu", points, most_rows=2, rounds=(2, 3), warmup=1, backend="eager")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the time allows, and say what it did not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    # Imports, and a step that has begun, come on top.
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--only", default="", metavar="TEXT", help="points with it in their name")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT))
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--force", action="store_true")
    given = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * given.minutes
    plan = (tiny_plan if given.tiny else gpu_plan)(given.dtype)
    named = [wanted for wanted in plan.wanted if given.only in str(wanted)]
    if not named:
        parser.error(f"no point is named {given.only!r}: {'; '.join(map(str, plan.wanted))}.")
    plan = replace(plan, wanted=named)
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
            skipped.append(f"{wanted}: {max(left, 0):.0f} seconds are left")
            continue
        share = wanted.share / sum(its.share for its in plan.wanted[place:])
        try:
            point = filled(wanted, methods, plan)
            found = measure(plan, point, methods, file, started + left * share, deadline)
        except OutOfTimeError:
            skipped.append(f"{wanted}: the time ran out within it")
        except Exception as error:  # what fails at one point must not cost the others' time
            skipped.append(f"{wanted}: {type(error).__name__}: {first_line(error)}")
        else:
            if found:
                file.add(found)
                console.print(time_table(found, str(point_of(found[0]))))
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
        if available is None or need_of(point, methods, plan.device).total < 0.8 * available:
            return point
    raise MSPLoraError(f"{wanted.point} does not fit")


def measure(
    plan: Plan,
    point: Point,
    methods: Sequence[str],
    file: ResultFile,
    until: float,
    deadline: float,
) -> list[dict]:
    """Measure a point, with half the batch if the estimate was wrong.

    Args:
        plan: the device, and how few and how many rounds.
        point: with its batch.
        methods: their names.
        file: what has been measured already.
        until: when the point's share of the time is over.
        deadline: when all time is.

    Returns:
        Its rows; none if the file has it.
    """
    watch = Watch(plan.rounds[0], until, deadline)
    while not file.holds(point.keys(), methods):
        try:
            return measure_speed(
                point,
                methods,
                rounds_until(until, plan.rounds),
                warmup=plan.warmup,
                device=plan.device,
                backend=plan.backend,
                on_step=watch.on_step,
                go_on=watch.go_on,
            )
        except RuntimeError as error:
            too_much = isinstance(error, TooFullError) or is_out_of_memory(error)
            if not too_much or point.batch == 1:
                raise
        free()  # out of the handler, whose traceback holds the models
        point = replace(point, batch=point.batch // 2)
    return []


class Watch:
    """Ends a point in time: at a round once there are enough, else within one, with nothing."""

    def __init__(self, fewest: int, until: float, deadline: float) -> None:
        self.fewest, self.until, self.deadline = fewest, until, deadline
        self.kept = 0

    def go_on(self, kept: int) -> bool:
        """Whether there is another round."""
        self.kept = kept
        return kept < self.fewest or time.monotonic() < self.until

    def on_step(self) -> None:
        """Raise if even the fewest rounds would take too long."""
        if self.kept < self.fewest and time.monotonic() > self.deadline:
            raise OutOfTimeError


def rounds_until(until: float, bounds: tuple[int, int]) -> Callable[[float], int]:
    """How many rounds of the length of the last fit until then."""
    fewest, most = bounds

    def rounds(last: float) -> int:
        return max(fewest, min(most, int((until - time.monotonic()) / last)))

    return rounds


def free() -> None:
    """Give back what the last point took."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return (str(error).strip().splitlines() or [""])[0][:200]


if __name__ == "__main__":
    main()
