"""The page's plots, as SVG: the same numbers give the same bytes, whatever the user's settings."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from msplora.page.plotting import COLOURS, DARK, LIGHT, MIDDLE, SETTINGS, svg

from .measured import AGAIN, LORA, OURS
from .tables import Verdict, rounded

BLUE, RED, GREEN, *_ = COLOURS
_MARKS = {
    Verdict.LEVEL: (BLUE, "o", "MSPLoRA, inside the A/A spread"),
    Verdict.FASTER: (GREEN, "s", "MSPLoRA, faster beyond the A/A spread"),
    Verdict.SLOWER: (RED, "^", "MSPLoRA, slower beyond the A/A spread"),
    Verdict.UNJUDGED: (MIDDLE, "D", "MSPLoRA, not judged"),
}
_SHOWN = " (medians, with quartiles)"

Quartiles = Sequence[float]


@dataclass(frozen=True)
class MethodMark:
    """A method's line in a plot of methods."""

    method: str
    label: str
    value: Quartiles


@dataclass(frozen=True)
class PointMark:
    """A point's line in a plot of points: ours and the A/A control, both against LoRA."""

    label: str
    ours: Quartiles
    again: Quartiles | None
    verdict: Verdict


def draw_methods(title: str, unit: str, marks: Sequence[MethodMark], digits: int) -> bytes:
    """Draw one line per method; LoRA's median runs through."""
    with matplotlib.style.context(["default", SETTINGS]):
        names = [_wrapped(mark.label) for mark in marks]
        figure, axes = _figure(names, title)
        for place, mark in enumerate(marks):
            colour, shape = _method_style(mark.method)
            _error_bar(axes, place, mark.value, colour, shape)
            axes.annotate(
                rounded(mark.value[1], digits, mark.method),
                (mark.value[2], place),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
        lora = [mark.value[1] for mark in marks if mark.method == LORA]
        if lora:
            axes.axvline(
                lora[0], color=DARK, linestyle=(0, (4, 3)), linewidth=1, label="LoRA's median"
            )
        _label_lines(axes, names, unit)
        axes.margins(x=0.13)
        _legend(figure, axes, 2)
        return svg(figure, title)


def draw_points(title: str, marks: Sequence[PointMark]) -> bytes:
    """Draw one line per point: the A/A band, and ours in the colour and shape of its verdict."""
    with matplotlib.style.context(["default", SETTINGS]):
        names = [_wrapped(mark.label) for mark in marks]
        figure, axes = _figure(names, title)
        for place, mark in enumerate(marks):
            if mark.again is not None:
                low, middle, high = mark.again
                axes.barh(place, high - low, 0.72, low, color=LIGHT, label="LoRA again, quartiles")
                axes.plot(
                    [middle, middle],
                    [place - 0.36, place + 0.36],
                    color=MIDDLE,
                    linewidth=1.2,
                    label="LoRA again, median",
                )
            colour, shape, label = _MARKS[mark.verdict]
            _error_bar(axes, place, mark.ours, colour, shape, label)
        axes.axvline(1, color=DARK, linestyle=(0, (4, 3)), linewidth=1, label="LoRA")
        _label_lines(axes, names, f"step time ÷ LoRA's at the same point{_SHOWN}")
        axes.margins(x=0.08)
        _legend(figure, axes, 3)
        return svg(figure, title)


def draw_depth(title: str, layers: Sequence[int], marks: Sequence[PointMark]) -> bytes:
    """Draw ours against LoRA over the number of layers."""
    with matplotlib.style.context(["default", SETTINGS]):
        figure, axes = _figure([""] * 8, title)
        band = [mark.again or mark.ours for mark in marks]
        axes.fill_between(
            layers,
            [value[0] for value in band],
            [value[2] for value in band],
            color=LIGHT,
            linewidth=0,
            label="LoRA again, quartiles",
        )
        axes.plot(
            layers, [v[1] for v in band], color=MIDDLE, linewidth=1.2, label="LoRA again, median"
        )
        axes.axhline(1, color=DARK, linestyle=(0, (4, 3)), linewidth=1, label="LoRA")
        axes.plot(layers, [mark.ours[1] for mark in marks], color=BLUE, linewidth=1, alpha=0.6)
        for depth, mark in zip(layers, marks, strict=True):
            colour, shape, label = _MARKS[mark.verdict]
            _error_bar(axes, depth, mark.ours, colour, shape, label, across=False)
        axes.set(xlabel=f"number of layers{_SHOWN}", ylabel="step time ÷ LoRA's")
        axes.set_xticks(list(layers))
        axes.grid(axis="y")
        _legend(figure, axes, 3)
        return svg(figure, title)


def _wrapped(label: str) -> str:
    """Leave room for the plot beside its longest name."""
    return textwrap.fill(label, 40)


def _figure(names: Sequence[str], title: str) -> tuple[Figure, Axes]:
    most = max(name.count("\n") for name in names)  # every line of a plot is as high as the highest
    figure = Figure(
        figsize=(8, 1.7 + (0.29 + 0.17 * most) * len(names)),
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1),
        facecolor="white",
    )
    figure.suptitle(title, x=0.013, ha="left", fontsize=11, fontweight="bold", color=DARK)
    axes = figure.add_subplot()
    axes.use_sticky_edges = False
    return figure, axes


def _error_bar(
    axes: Axes,
    place: float,
    value: Quartiles,
    colour: str,
    shape: str,
    label: str = "",
    *,
    across: bool = True,
) -> None:
    low, middle, high = value
    error = [[middle - low], [high - middle]]
    where = {"x": middle, "y": place, "xerr": error} if across else {}
    axes.errorbar(
        **(where or {"x": place, "y": middle, "yerr": error}),
        fmt=shape,
        color=colour,
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.7,
        elinewidth=1.6,
        label=label or None,
        zorder=3,
    )


def _method_style(method: str) -> tuple[str, str]:
    if method == OURS:
        return BLUE, "o"
    return (DARK, "D") if method in (LORA, AGAIN) else (MIDDLE, "s")


def _label_lines(axes: Axes, labels: Sequence[str], unit: str) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel(unit)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles: dict[str, Any] = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        handles.setdefault(label, handle)
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower left", ncols=columns, fontsize=9
        )
