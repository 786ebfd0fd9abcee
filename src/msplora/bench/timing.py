"""The clock: interleaved rounds, and what is made of their times.

In a round every method takes one step. Ratios are taken within a round, so that what disturbs a
machine for seconds disturbs both sides of a ratio; what is left is shown by the A/A control, the
same method a second time.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Seconds = dict[str, list[float]]
"""Method → the time of its step in each round."""


def order(names: Sequence[str], round_number: int) -> list[str]:
    """Who steps when in a round: a Latin square balanced for what one method leaves to the next.

    Over n rounds (2n for an odd n) each of n methods is in every place equally often, and follows
    every other within its round equally often: what a step leaves in the caches and in the
    allocator is shared out.
    Source: E. J. Williams, Australian Journal of Scientific Research A 2 (1949), 149-168.
    """
    count = len(names)
    # 0, 1, n - 1, 2, n - 2, ...: every distance between neighbours is there once.
    row = [-(place // 2) if place % 2 == 0 else place // 2 + 1 for place in range(count)]
    found = [names[(place + round_number) % count] for place in row]
    return found[::-1] if count % 2 and round_number // count % 2 else found


def run_rounds(
    steps: Mapping[str, Callable[[], object]],
    rounds: int | Callable[[float], int],
    *,
    warmup: int = 5,
    synchronise: Callable[[], object] = lambda: None,
    on_step: Callable[[], object] = lambda: None,
    go_on: Callable[[int], bool] = lambda kept: True,
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Step all methods, round after round.

    Args:
        steps: method → what takes one step of it.
        rounds: how many are kept; or a function that says so, told the seconds that the last round
            of warming up took.
        warmup: rounds before, of which nothing is kept.
        synchronise: waits for the device, so that a step's time is all of its work.
        on_step: called after every step, warming up included, off the clock; what it raises ends
            the measurement.
        go_on: asked before every round that is kept, with how many are; at False there are no more.
        clock: seconds, for tests.
    """
    names = list(steps)
    found: Seconds = {name: [] for name in names}
    was_on = gc.isenabled()
    gc.collect()
    # A collection lands on whichever method is stepping just then.
    gc.disable()
    try:
        last = math.nan
        for number in range(warmup):
            started = clock()
            for name in order(names, number):
                steps[name]()
                synchronise()
                on_step()
            last = clock() - started
        count = rounds(last) if callable(rounds) else rounds
        for number in range(count):
            if not go_on(number):
                break
            for name in order(names, number):
                synchronise()
                started = clock()
                steps[name]()
                synchronise()
                found[name].append(clock() - started)
                on_step()
    finally:
        if was_on:
            gc.enable()
    return found


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile; of one value, that value three times."""
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def ratios(times: Sequence[float], of: Sequence[float]) -> list[float]:
    """How a method compares with another, round by round."""
    return [own / other for own, other in zip(times, of, strict=True)]


def figures(seconds: Seconds, method: str) -> dict[str, list[float]]:
    """A row's quartiles: of the seconds, and of the ratios to the floor and to LoRA."""
    own = seconds[method]
    return {
        "seconds": quartiles(own),
        "to_floor": quartiles(ratios(own, seconds["floor"])),
        "to_lora": quartiles(ratios(own, seconds["lora"])),
    }
