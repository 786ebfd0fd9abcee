"""A dry run as a person reads it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .dry_run import DryRun
from .dry_run_devices import not_foreseen, on_each
from .memory_trace import Held, Peak
from .preview import show_preview
from .target import CPU_SLACK, CUDA_SLACK, GIB

_COLOURS = {True: "green", False: "red", None: "yellow"}


def show_dry_run(found: DryRun, console: Console) -> None:
    """Print the plan of the run, its memory, and whether it fits."""
    show_preview(found.job, console)
    console.print(_memory_table(found))
    for line in _lines(found):
        console.print(line, highlight=False, soft_wrap=True)


def size(count: int) -> str:
    """Bytes in the unit in which they are easily read."""
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def verdict(found: DryRun) -> str:
    """One sentence: does it fit?"""
    needed, capacity = found.needed / GIB, found.target.capacity / GIB
    digits = 1 if needed >= 1 else 3
    spread = not_foreseen(found.devices)
    said = {True: "fits", False: "does not fit", None: "with all of it on one device"}[found.fits]
    of = found.target.name + on_each(found.devices, found.target.on_gpu) * (not spread)
    sentence = f"{said}: {needed:.{digits}f} of {capacity:.{digits}f} GiB ({of})"
    if found.fits is None:
        sentence += f"; {spread}, and what each then takes is not foreseen"
    return sentence


def _memory_table(found: DryRun) -> Table:
    peaks: list[tuple[str, Peak]] = [("training", found.estimate.training)]
    if found.estimate.evaluation:
        peaks.append(("evaluation", found.estimate.evaluation))
    table = Table("memory at the peak of", *(name for name, _ in peaks))
    for column in table.columns[1:]:
        column.justify = "right"
    for held in Held:
        row = [peak.parts.get(held, 0) for _, peak in peaks]
        if any(row):
            table.add_row(held.value, *(size(its) if its else "" for its in row))
    table.add_row("all tensors", *(size(peak.total) for _, peak in peaks), style="bold")
    if found.measured:
        measured = [found.measured.training, found.measured.evaluation]
        table.add_row("measured", *(size(its) for its in measured if its is not None))
        off = [
            f"{peak.total / its - 1:+.1%}"
            for (_, peak), its in zip(peaks, measured, strict=False)
            if its
        ]
        table.add_row("the estimate is off by", *off)
    return table


def _lines(found: DryRun) -> list[Any]:
    schedule, disk, estimate = found.schedule, found.disk, found.estimate
    settings = found.job.record.settings
    of_text = settings.task != "image-classification"
    rows = min(settings.training.batch_size, schedule.rows)
    lines = [
        f"• the peak of a step is in its {estimate.training.where}; it is of "
        + (f"the longest {rows} rows, the longest of {schedule.longest:,} tokens" * of_text)
        + (f"{rows} images" * (not of_text))
    ]
    beside = size(found.beside_tensors)
    if found.target.on_gpu:
        lines.append(
            f"• beside the tensors {beside}: CUDA's context and cuBLAS, and {CUDA_SLACK:.0%} of "
            f"what comes and goes for the allocator (assumed, not measured)"
        )
    else:
        lines.append(
            f"• beside the tensors {beside}: what libraries take at first use, and "
            f"{CPU_SLACK:.0%} of what comes and goes for the allocator"
        )
    lines += [
        f"• {schedule.steps:,} steps of {schedule.rows_per_step:,} rows, "
        f"{schedule.warmup_steps:,} of them to warm up; {schedule.rows:,} rows"
        + f" and {schedule.tokens_per_epoch:,} tokens" * of_text
        + " per epoch",
        f"• on disk {size(disk.weights)} trained, {size(disk.checkpoint)} per checkpoint, at most "
        f"{size(disk.at_most)} while it trains",
        f"[bold {_COLOURS[found.fits]}]{verdict(found)}[/]",
    ]
    for remedy in found.remedies:
        told = ", ".join(f"{key}={_plain(value)}" for key, value in remedy.changes.items())
        enough = "fits" if remedy.needed <= found.target.capacity else "not enough"
        lines.append(f"  with {told}: {size(remedy.needed)} ({enough})")
    return lines


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
