"""`msplora bench`: what a training step costs beside LoRA's, in time and in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import bench_render, bench_size
from .bench_running import print_tables, sweep, use_device

if TYPE_CHECKING:
    from msplora.bench.points import Point

bench_app = typer.Typer(
    help="Measure what a training step costs, side by side with LoRA and others.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Lists for options that may be repeated; typer copies them.
SHAPE, TARGETS, DTYPE, CHECKPOINTING = ["roberta-base"], ["qv"], ["float32"], ["none"]
BATCH, LENGTH, DROPOUT = [8], [128], [0.0]
SITES, TOKENS = ["768x768", "768x3072", "3072x768"], [1024]

# Options that several verbs have. Names are checked by the library, which suggests the nearest.
Shapes = Annotated[
    list[str],
    typer.Option(
        "--shape", help="roberta-base, llama-3.2-1b, llama-3.2-3b, llama-2-7b; tiny-… for tests."
    ),
]
Layers = Annotated[
    list[int] | None, typer.Option("--layers", help="How many; the shape's own if left out.")
]
Targets = Annotated[list[str], typer.Option("--targets", help="qv or all-linear.")]
DTypes = Annotated[
    list[str],
    typer.Option(
        "--dtype",
        help="float32; bfloat16: the base, with PEFT's float32 adapters; bfloat16-pure: the "
        "adapters too; bfloat16-autocast: as bfloat16, in autocast.",
    ),
]
Batches = Annotated[list[int], typer.Option("--batch", help="Rows of a step.")]
Lengths = Annotated[list[int], typer.Option("--length", help="Tokens of a row.")]
Dropouts = Annotated[list[float], typer.Option("--dropout", help="Of the adapters.")]
Checkpointing = Annotated[
    list[str],
    typer.Option("--checkpointing", help="Of gradients: none, reentrant or non-reentrant."),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="floor, full, lora, lora-again, lora-equal-rank, gralora, vera, branches, msplora; "
        "by default floor, lora, lora-again (the A/A control) and msplora.",
    ),
]
Rounds = Annotated[int, typer.Option(min=1, help="Steps of each method; 60 for a claim.")]
Warmup = Annotated[int, typer.Option(min=1, help="Rounds before, of which nothing is kept.")]
Compile = Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile, fullgraph.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int, typer.Option(min=1, help="Of torch, on a CPU.")]
Output = Annotated[
    Path | None,
    typer.Option(help="JSON file, written after every point; only printed if left out."),
]
Append = Annotated[
    bool, typer.Option("--append", help="Continue the file: skip the points it has.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the file.")]


@bench_app.command()
def speed(
    shape: Shapes = SHAPE,
    layers: Layers = None,
    targets: Targets = TARGETS,
    dtype: DTypes = DTYPE,
    batch: Batches = BATCH,
    length: Lengths = LENGTH,
    dropout: Dropouts = DROPOUT,
    checkpointing: Checkpointing = CHECKPOINTING,
    compiled: Compile = False,
    method: Methods = None,
    rounds: Rounds = 60,
    warmup: Warmup = 5,
    device: Device = "cpu",
    threads: Threads = 2,
    output: Output = None,
    append: Append = False,
    force: Force = False,
) -> None:
    """Time a training step (forward, backward, AdamW) of every method, in interleaved rounds.

    Every option of a point may be repeated: all combinations are measured.
    """
    from msplora.bench.methods import DEFAULT, NEEDED, checked
    from msplora.bench.points import all_points
    from msplora.bench.results import check

    points = all_points(
        shape, layers, targets, dtype, batch, length, dropout, checkpointing, compiled
    )
    names = checked(method or DEFAULT, needed=NEEDED)
    check(output, append=append, force=force)
    use_device(device, threads)

    from msplora.bench.fits import check_fits
    from msplora.bench.results import ResultFile
    from msplora.bench.speed import measure_speed
    from msplora.bench.sweep import missing
    from msplora.bench.terminal import time_table

    file = ResultFile(output, "speed", append=append, force=force, device=device)
    left = missing(points, names, file, {"rounds": rounds})
    check_fits(left, names, device)

    def measure(point: Point, on_step: Callable[[], None]) -> list[dict[str, Any]]:
        return measure_speed(point, names, rounds, warmup=warmup, device=device, on_step=on_step)

    sweep(left, measure, file, (rounds + warmup) * len(names))
    print_tables(points, file.rows, time_table)


@bench_app.command()
def memory(
    shape: Shapes = SHAPE,
    layers: Layers = None,
    targets: Targets = TARGETS,
    dtype: DTypes = DTYPE,
    batch: Batches = BATCH,
    length: Lengths = LENGTH,
    dropout: Dropouts = DROPOUT,
    checkpointing: Checkpointing = CHECKPOINTING,
    compiled: Compile = False,
    method: Methods = None,
    device: Device = "cpu",
    threads: Threads = 2,
    output: Output = None,
    append: Append = False,
    force: Force = False,
) -> None:
    """Read the peak memory of a training step of every method, each in a process of its own.

    Live bytes are those of tensors: all of them, and those that the step adds to what lives from
    step to step. The resident set is the whole process's, libraries included.
    """
    from msplora.bench.methods import CONTROL, DEFAULT, checked
    from msplora.bench.points import all_points
    from msplora.bench.results import check

    points = all_points(
        shape, layers, targets, dtype, batch, length, dropout, checkpointing, compiled
    )
    # Bytes do not vary: there is nothing for an A/A control to show.
    names = checked(method or [name for name in DEFAULT if name != CONTROL])
    check(output, append=append, force=force)
    use_device(device, threads)

    from msplora.bench.fits import check_fits
    from msplora.bench.memory import measure_memory_apart
    from msplora.bench.results import ResultFile
    from msplora.bench.sweep import missing
    from msplora.bench.terminal import memory_table

    file = ResultFile(output, "memory", append=append, force=force, device=device)
    left = missing(points, names, file, {})
    for name in names:  # one at a time
        check_fits(left, [name], device)

    def measure(point: Point, on_step: Callable[[], None]) -> list[dict[str, Any]]:
        rows = []
        for name in names:
            rows.append(measure_memory_apart(point, name, device, threads))
            on_step()
        return rows

    sweep(left, measure, file, len(names))
    print_tables(points, file.rows, memory_table)


@bench_app.command()
def sites(
    site: Annotated[
        list[str], typer.Option("--site", metavar="INxOUT", help="A linear layer's sides.")
    ] = SITES,
    tokens: Annotated[
        list[int], typer.Option("--tokens", help="How many pass the layer.")
    ] = TOKENS,
    dtype: DTypes = DTYPE,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="floor, lora, lora-again, lora-equal-rank, branches, msplora; all by default.",
        ),
    ] = None,
    rounds: Rounds = 60,
    warmup: Warmup = 5,
    device: Device = "cpu",
    threads: Threads = 2,
    output: Output = None,
    append: Append = False,
    force: Force = False,
) -> None:
    """Time single adapted layers, forward and backward, outside any model."""
    from msplora.bench.methods import NEEDED, SITE_METHODS, checked
    from msplora.bench.points import DTYPES, check_name, site_points
    from msplora.bench.results import check

    for name in dtype:
        check_name("dtype", name, DTYPES)
    points = site_points(site, tokens, dtype)
    names = checked(method or SITE_METHODS, needed=NEEDED, among=SITE_METHODS)
    check(output, append=append, force=force)
    use_device(device, threads)

    from msplora.bench.fits import check_sites_fit
    from msplora.bench.results import ResultFile
    from msplora.bench.sites import measure_site
    from msplora.bench.sweep import missing
    from msplora.bench.terminal import time_table

    file = ResultFile(output, "sites", append=append, force=force, device=device)
    left = missing(points, names, file, {"rounds": rounds})
    check_sites_fit(left, device)

    def measure(point: Any, on_step: Callable[[], None]) -> list[dict[str, Any]]:
        return measure_site(point, names, rounds, warmup=warmup, device=device, on_step=on_step)

    sweep(left, measure, file, (rounds + warmup) * len(names))
    print_tables(points, file.rows, time_table)


bench_app.command("size")(bench_size.size)
bench_app.command("render")(bench_render.render)
