"""What the verbs of `msplora bench` share: the device, the bars, the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .progress_console import progress_console


def use_device(device: str, threads: int) -> None:
    """Take the device, or refuse it; the first moment at which torch is needed."""
    from msplora.bench.points import DEVICES, check_name
    from msplora.errors import MSPLoraError

    check_name("device", device, DEVICES)
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise MSPLoraError("there is no GPU that torch can use here: leave --device out for a CPU.")
    torch.set_num_threads(threads)


def sweep(
    points: Sequence[Any],
    measure: Callable[[Any, Callable[[], None]], list[dict[str, Any]]],
    file: Any,
    steps: int,
) -> None:
    """Run the sweep behind a bar of points and one of the point's steps."""
    from msplora.bench.sweep import run_sweep

    with _bars(len(points), steps) as (on_point, on_step):
        run_sweep(points, lambda point: measure(point, on_step), file, on_point)


@contextmanager
def _bars(points: int, steps: int) -> Iterator[tuple[Callable[[object], None], Callable[[], None]]]:
    """Yield what to call when a point begins, and after each of its steps."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    begun = 0
    with Progress(*columns, TimeElapsedColumn(), console=progress_console()) as progress:
        whole = progress.add_task("points", total=points)
        part = progress.add_task("steps", total=steps)

        def on_point(point: object) -> None:
            nonlocal begun
            progress.update(whole, completed=begun)
            progress.reset(part, description=str(point))
            begun += 1

        yield on_point, lambda: progress.advance(part)
        progress.update(whole, completed=points)


def print_tables(
    points: Sequence[Any], rows: Sequence[dict[str, Any]], table: Callable[..., Any]
) -> None:
    """One table for each point that was asked for, earlier rows of a continued file included."""
    from rich.console import Console

    console = Console()
    for point in points:
        keys = point.keys()
        own = [row for row in rows if all(row.get(key) == keys[key] for key in keys)]
        console.print(table(own, str(point)))
