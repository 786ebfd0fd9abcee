"""`msplora bench size`: injection, files and singular values, side by side with LoRA's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .bench_running import print_tables, sweep, use_device

# Lists for options that may be repeated; typer copies them.
LAYERS, RANKS = [8, 16, 32, 64, 80], [112, 14]


def size(
    shape: Annotated[
        str, typer.Option(help="Whose model adapters are put into, on the meta device.")
    ] = "llama-2-7b",
    layers: Annotated[
        list[int], typer.Option("--layers", help="Depths, for all linear layers.")
    ] = LAYERS,
    file_shape: Annotated[
        str, typer.Option(help="Whose model adapters are saved from and loaded into.")
    ] = "roberta-base",
    side: Annotated[
        int, typer.Option(help="Of the update whose singular values are found.")
    ] = 4096,
    rank: Annotated[list[int], typer.Option("--rank", help="Of that update.")] = RANKS,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="Of each method; of singular values at most 5."),
    ] = 20,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 2,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file, written after every point; only printed if left out."),
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Continue the file: skip the points it has.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Time putting adapters into a model, weigh and time their files, find singular values.

    Methods take turns: LoRA r = 8, the same once more (the A/A control), and the pyramid r = 8.
    """
    from msplora.bench.results import check
    from msplora.bench.size_points import file_points, inject_points, values_points

    injecting = inject_points(shape, layers)
    files = file_points(file_shape)
    values = values_points(side, rank)
    check(output, append=append, force=force)
    use_device("cpu", threads)

    from msplora.bench import size as its
    from msplora.bench.fits import check_sizes_fit
    from msplora.bench.results import ResultFile
    from msplora.bench.size_tables import size_table
    from msplora.bench.sweep import missing

    file = ResultFile(output, "size", append=append, force=force, device="cpu")
    methods = list(its.CONFIGS)
    steps = (rounds + its.WARMUP) * len(methods)
    few = min(rounds, its.DENSE_ROUNDS)
    parts: list[tuple[list[Any], Any, int, int]] = [
        (missing(injecting, methods, file, {"rounds": rounds}), its.measure_inject, rounds, steps),
        (missing(files, methods, file, {"rounds": rounds}), its.measure_file, rounds, 2 * steps),
        (
            missing(values, its.VALUES_METHODS, file, {"rounds": few}),
            its.measure_values,
            few,
            2 * (few + 1),
        ),
    ]
    for points, *_ in parts:
        check_sizes_fit(points)
    for points, measure, times, total in parts:
        sweep(points, lambda it, on_step, m=measure, n=times: m(it, n, on_step), file, total)
    print_tables([*injecting, *files, *values], file.rows, size_table)
