"""What the demo leaves to look at: a table in the terminal and as markdown, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from .task import HELD_OUT, Example

HEADER = ("", "trained", "bytes", "loss per token", "exact match")


@dataclass(frozen=True)
class Measured:
    """One model of the comparison, measured on the held-out questions."""

    name: str
    exact_match: float
    loss: float
    trainable: int | None = None
    file_bytes: int | None = None
    """Of the file that holds what was trained."""

    def cells(self) -> tuple[str, ...]:
        """The row, one text for each column of `HEADER`."""
        return (
            self.name,
            "" if self.trainable is None else f"{self.trainable:,}",
            "" if self.file_bytes is None else f"{self.file_bytes:,}",
            f"{self.loss:.4f}",
            f"{self.exact_match:.3f}",
        )


def table(rows: Sequence[Measured]) -> Table:
    """The comparison for the terminal."""
    shown = Table(*HEADER, title=f"{HELD_OUT} questions that no training row holds")
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in rows:
        shown.add_row(*row.cells())
    return shown


def markdown(rows: Sequence[Measured], examples: Sequence[tuple[Example, dict[str, str]]]) -> str:
    """The comparison and a few answers, as README.md of the demo's folder holds them."""
    lines = [
        "# Five words in reverse order",
        "",
        f"A small pretrained language model, before and after; {HELD_OUT} held-out questions.",
        "",
        f"| {' | '.join(HEADER)} |",
        "|---|" + "---:|" * (len(HEADER) - 1),
        *(f"| {' | '.join(row.cells())} |" for row in rows),
        "",
        "![Loss and exact match](comparison.png)",
        "",
        "## Answers",
        "",
    ]
    for example, answers in examples:
        lines += [f"    {example.prompt}"]
        lines += [f"        {name + ':':<14} {answer}" for name, answer in answers.items()] + [""]
    return "\n".join(lines)


def draw(histories: dict[str, list[dict[str, Any]]], rows: Sequence[Measured], file: Path) -> None:
    """Draw the loss of each method while it trained, and what each model gets right."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no global state of pyplot's
    loss, right = figure.subplots(1, 2)
    for place, (name, history) in enumerate(histories.items()):
        colour = f"C{place}"
        training = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        held_out = [(its["step"], its["eval_loss"]) for its in history if "eval_loss" in its]
        loss.plot(*zip(*training, strict=True), color=colour, label=f"{name}, training")
        loss.plot(
            *zip(*held_out, strict=True),
            color=colour,
            label=f"{name}, held-out",
            marker="o",
            linestyle="--",
        )
    loss.set(xlabel="step", ylabel="loss per token", yscale="log")
    loss.grid(alpha=0.3)
    loss.legend()
    bars = right.barh([row.name for row in rows], [row.exact_match for row in rows], color="0.6")
    right.bar_label(bars, [f" {row.exact_match:.3f}" for row in rows])
    right.invert_yaxis()
    right.set(xlabel="exact match on held-out questions", xlim=(0, 1.15))
    figure.savefig(file, dpi=120)
