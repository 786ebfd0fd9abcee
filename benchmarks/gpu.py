"""What a step costs on one GPU: time, tokens per second, peak memory, kernel launches.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json

Llama-3.2-3B and Llama-2-7B with random weights in bfloat16, query and value or all linear layers,
eager and compiled; batches of 2, on which a minute is enough for a verdict, and those that fill the
card. The points come in the order of their importance, each gets as many rounds as its share of the
time allows, and the file is written after each. What there was no time for is named at the end, and
measured by the same command with --append; --only compiled measures the points of that name. A copy
without its history needs the commit in $COMMIT, and code that is not committed is refused. `--tiny`
goes the same way on a CPU, with tiny models.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from msplora.bench.fits import available_bytes, need_of
from msplora.bench.methods import DEFAULT, NEEDED, checked
from msplora.bench.points import DTYPES, Point, point_of
from msplora.bench.provenance import commit
from msplora.bench.results import ResultFile, check
from msplora.bench.speed import measure_speed
from msplora.bench.sweep import is_out_of_memory
from msplora.bench.tables import MIN_ROUNDS
from msplora.bench.terminal import time_table
from msplora.errors import MSPLoraError


@dataclass(frozen=True)
class Wanted:
    """A point whose batch is still to be chosen, and the time that it takes."""

    point: Point
    least: float = 15.0
    """Seconds to build it, compile it and warm up, which its share of the time does not pay for."""
    share: float = 1.0
    """Of the time that is left for rounds, relative to the points after it."""
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
    """The points of a GPU. Compiled ones have 2 layers, since compiling takes time per layer."""

    def llama(name: str, layers: int, targets: str, batch: int, compiled: bool = False) -> Point:
        return Point(name, layers, targets, dtype, batch, 1024, compiled=compiled)

    small, large = ("llama-3.2-3b", 28), ("llama-2-7b", 32)
    eager = [(shape, targets) for shape in (small, large) for targets in ("all-linear", "qv")]
    judged = [Wanted(llama(*shape, targets, 2), share=4) for shape, targets in eager]
    # Where a step is short, the time to launch its kernels shows.
    single = [Wanted(llama(*small, "qv", 1), least=10)]
    first, *others = (
        Wanted(llama(shape[0], 2, targets, 2, compiled=True), least=45) for shape, targets in eager
    )
    filling = [Wanted(llama(*shape, targets, 1), share=2, fill=True) for shape, targets in eager]
    # Both shapes and both targets before the other two compiled ones.
    wanted = [*judged, *single, first, others[-1], *filling, *others[:-1]]
    return Plan("cuda", wanted, most_rows=64, rounds=(3, MIN_ROUNDS), warmup=3)


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
        if not given.tiny and (commit() == "unknown" or commit().endswith("-dirty")):
            raise MSPLoraError(
                f"the commit is {commit()}, so nobody could tell what was measured: commit, or say "
                f"it in $COMMIT where this is a copy without its history."
            )
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
        try:
            point = filled(wanted, methods, plan)
            found = measure(plan, point, methods, file, seconds_for(plan, place, left), deadline)
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


def seconds_for(plan: Plan, place: int, left: float) -> float:
    """How many of the seconds left the point at this place may take, the least it needs included.

    Where not all points can be measured, the first of them get what they need.
    """
    reserved, shares = 0.0, 0.0
    for wanted in plan.wanted[place:]:
        if shares and reserved + wanted.least > left / 2:
            break
        reserved += wanted.least
        shares += wanted.share
    wanted = plan.wanted[place]
    return wanted.least + max(left - reserved, 0) * wanted.share / shares


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
    seconds: float,
    deadline: float,
) -> list[dict]:
    """Measure a point, with half the batch if the estimate was wrong, which starts anew.

    Args:
        plan: the device, and how few and how many rounds.
        point: with its batch.
        methods: their names.
        file: what has been measured already.
        seconds: the point's share of the time.
        deadline: when all time is.

    Returns:
        Its rows; none if the file has it.
    """
    while not file.holds(point.keys(), methods):
        watch = Watch(plan.rounds, time.monotonic() + seconds, deadline)
        try:
            return measure_speed(
                point,
                methods,
                watch.rounds,
                warmup=plan.warmup,
                device=plan.device,
                backend=plan.backend,
                on_step=watch.on_step,
                go_on=watch.go_on,
            )
        except RuntimeError as error:
            if not is_out_of_memory(error) or point.batch == 1:
                raise
        free()  # out of the handler, whose traceback holds the models
        point = replace(point, batch=point.batch // 2)
    return []


class Watch:
    """Ends a point in time: at a round once there are enough, else within one, with nothing.

    Args:
        bounds: the fewest rounds, and the most, which are enough for a verdict.
        until: when the point should end.
        deadline: when all has to.
    """

    def __init__(self, bounds: tuple[int, int], until: float, deadline: float) -> None:
        self.fewest, self.most = bounds
        self.until, self.deadline = until, deadline
        self.kept = 0

    def rounds(self, last: float) -> int:
        """How many rounds of the length of the last there are: all, if most of them fit."""
        fit = int((self.until - time.monotonic()) / last)
        if fit >= 0.8 * self.most:
            self.until += (self.most - fit) * last if fit < self.most else 0
            return self.most
        return max(self.fewest, fit)

    def go_on(self, kept: int) -> bool:
        """Whether there is another round."""
        self.kept = kept
        nearly = kept >= 0.8 * self.most and time.monotonic() < self.deadline
        return kept < self.fewest or nearly or time.monotonic() < self.until

    def on_step(self) -> None:
        """Raise if even the fewest rounds would take too long."""
        if self.kept < self.fewest and time.monotonic() > self.deadline:
            raise OutOfTimeError


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
