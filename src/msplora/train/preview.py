"""What is shown before the first step: the plan, what trains, warnings, a row and its mask."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .data_check import DataCheck
from .job import Job
from .methods import Adapted
from .peft_methods import has_adapter, ranks_change


def show_preview(job: Job, console: Console) -> None:
    """Print what the run is about to do, and on what."""
    settings = job.record.settings
    console.rule(escape(f"{settings.method} · {settings.task} · {settings.model}"))
    if job.adapted.plan:
        console.print(str(job.adapted.plan), highlight=False, markup=False, soft_wrap=True)
    console.print(_trainable_table(job.adapted, job.record.settings.method))
    for note in (*job.base.notes, *job.adapted.notes, *job.data_notes):
        console.print(f"• {note}", highlight=False, markup=False, soft_wrap=True)


def show_sample(job: Job, console: Console) -> None:
    """Print a training row as the model sees it."""
    console.print("\nA training row" + _legend(job.record.settings.task))
    console.print(job.sample, soft_wrap=True)
    console.print()


def show_warnings(check: DataCheck, console: Console) -> None:
    """Print what is usually a mistake in the rows."""
    for warning in check.warnings:
        console.print(f"! {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def plan_record(adapted: Adapted, method: str) -> dict[str, Any]:
    """The plan as plan.json holds it: what trains, and the pyramid where there is one."""
    trainable = adapted.trainable
    return {
        "method": method,
        "trainable": trainable.total,
        "trainable_adapter": trainable.adapter,
        "trainable_head": trainable.head,
        "base": trainable.base,
        "lora": trainable.lora,
        "rank_per_layer": adapted.rank,
        "plan": adapted.plan.to_dict() if adapted.plan else None,
    }


def plan_text(adapted: Adapted, method: str) -> str:
    """The plan as plan.txt holds it."""
    trainable = adapted.trainable
    lines = [str(adapted.plan), ""] if adapted.plan else []
    if method == "full":
        lines.append(f"method full: all {trainable.total:,} numbers of the model train")
    else:
        at_the_start = " at the start" if ranks_change(method) else ""
        lines.append(
            f"method {method}: {trainable.total:,} numbers train{at_the_start} "
            f"({trainable.adapter:,} in the adapter, {trainable.head:,} in the head) beside a base "
            f"of {trainable.base:,}"
        )
    if adapted.plan and trainable.lora:
        lines.append(
            f"plain LoRA on the same layers: {trainable.lora:,} in the adapter; this one has "
            f"{trainable.adapter / trainable.lora:.1%} of that"
        )
    return "\n".join(lines) + "\n"


def _legend(task: str) -> str:
    counts = " (the loss counts what stands between ▶ and ◀):"
    return counts if task in ("sft", "dpo") else ":"


def _trainable_table(adapted: Adapted, method: str) -> Table:
    trainable = adapted.trainable
    table = Table("", "numbers", "share of the base", "against LoRA")
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, count: int, lora: int | None = None) -> None:
        against = f"{count / lora:.1%}" if lora else ""
        table.add_row(name, f"{count:,}", f"{count / trainable.base:.2%}", against)

    add("adapter" if has_adapter(method) else "trained base", trainable.adapter, trainable.lora)
    if trainable.lora and adapted.plan:
        add("plain LoRA, same layers and r", trainable.lora, trainable.lora)
    if trainable.head:
        add("head", trainable.head)
    add("all that trains", trainable.total)
    return table
