"""The run's curves, as loss.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_loss(
    history: list[dict[str, Any]], evaluations: list[dict[str, Any]], best: str, file: Path
) -> None:
    """Draw the training loss, and the held-out metric that picks the best checkpoint."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no global state of pyplot's
    axes = figure.add_subplot()
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if points:
        axes.plot(*zip(*points, strict=True), label="training loss", color="tab:blue")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    judged = [(entry["step"], entry[best]) for entry in evaluations if best in entry]
    if judged:
        same_scale = best == "loss"
        right = axes if same_scale else axes.twinx()
        right.plot(
            *zip(*judged, strict=True), label=f"held-out {best}", color="tab:orange", marker="o"
        )
        if not same_scale:
            right.set_ylabel(best)
    lines = [line for its in figure.axes for line in its.get_lines()]
    if lines:
        figure.axes[-1].legend(handles=lines)  # the topmost, or a curve would cross it
    figure.savefig(file, dpi=120)
