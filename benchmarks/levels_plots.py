"""The plots of docs/analysis.md: each figure of the runs beside that of chance."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib.style
from levels_page import shown_overlap
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from msplora.page.plotting import COLOURS, DARK, LIGHT, MIDDLE, SETTINGS, svg

Row = dict[str, Any]
Seeds = Sequence[Row]
BLUE, RED, GREEN, *_ = COLOURS


def draw(groups: Sequence[Seeds]) -> dict[str, bytes]:
    """Name of a plot → its SVG."""
    with matplotlib.style.context(["default", SETTINGS]):
        return {
            "ranks": _lines(
                groups,
                "Effective rank, in parts of the rank",
                "effective rank ÷ rank",
                _ranks,
            ),
            "levels": _lines(
                [seeds for seeds in groups if len(seeds[0]["levels"]) > 1],
                "How much of a level lies in the columns of those before it",
                "share of the square",
                _overlaps,
            ),
            "layers": _shared([seeds for seeds in groups if len(seeds[0]["levels"]) == 1]),
        }


def _ranks(seeds: Seeds) -> Iterator[tuple[str, list[Row]]]:
    for place, level in enumerate(seeds[0]["levels"]):
        found = [run["levels"][place]["effective_rank"] for run in seeds]
        relative = [{name: its / level["rank"] for name, its in one.items()} for one in found]
        name = "" if level["level"] == "lora" else f", {level['level']}"
        yield f"{seeds[0]['name']}{name}", relative


def _overlaps(seeds: Seeds) -> Iterator[tuple[str, list[Row]]]:
    for place, overlap in enumerate(seeds[0]["between_levels"]):
        if shown_overlap(overlap, seeds[0]):
            name = f"{seeds[0]['name']}: {overlap['level']} in {overlap['of']}"
            yield name, [run["between_levels"][place]["columns"] for run in seeds]


def _lines(
    groups: Sequence[Seeds],
    title: str,
    unit: str,
    marks: Callable[[Seeds], Iterator[tuple[str, list[Row]]]],
) -> bytes:
    """One panel per task; a line per level, with a point per seed and the range of chance."""
    tasks = _by_task(groups)
    lines = {task: [mark for seeds in its for mark in marks(seeds)] for task, its in tasks.items()}
    heights = [len(its) + 1 for its in lines.values()]
    figure = _figure(title, (8, 1.0 + 0.3 * len(lines) + 0.27 * sum(heights)))
    panels = figure.subplots(len(lines), 1, squeeze=False, height_ratios=heights)
    for axes, (task, its) in zip(panels[:, 0], lines.items(), strict=True):
        for place, (_, seeds) in enumerate(its):
            chance, deviation = (
                statistics.fmean(one[name] for one in seeds) for name in ("chance", "deviation")
            )
            axes.barh(
                place, 4 * deviation, 0.7, chance - 2 * deviation, color=LIGHT,
                label="chance: mean ± 2 standard deviations",
            )  # fmt: skip
            axes.plot([chance, chance], [place - 0.35, place + 0.35], color=MIDDLE, linewidth=1.2)
            found = [one["found"] for one in seeds]
            axes.plot(found, [place] * len(found), "o", color=BLUE, markersize=5, label="a seed",
                      markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
        axes.set_yticks(range(len(its)), [name for name, _ in its])
        axes.set_ylim(len(its) - 0.4, -0.6)
        axes.set_title(task, loc="left", fontsize=10)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    panels[-1, 0].set_xlabel(unit)
    _legend(figure, panels[0, 0])
    return svg(figure, title)


def _shared(groups: Sequence[Seeds]) -> bytes:
    """What one thing of rank k, shared by all layers of a LoRA, holds of their updates."""
    title = "LoRA: what one space or pair of rank k holds of all layers' updates"
    kinds = max(len(seeds[0]["kinds"]) for seeds in groups)
    figure = _figure(title, (8, 1.0 + 2.3 * len(groups)))
    panels = figure.subplots(len(groups), kinds, squeeze=False, sharey=True)
    for row, seeds in zip(panels, groups, strict=True):
        for place, (axes, kind) in enumerate(zip(row, seeds[0]["kinds"], strict=False)):
            for figure_name, name, colour in (
                ("shared_columns", "columns", BLUE),
                ("shared_rows", "rows", RED),
                ("shared_pair", "one pair", GREEN),
            ):
                curves = [run["kinds"][place][figure_name] for run in seeds]
                _curve(axes, [[its["found"] for its in one] for one in curves], colour, name)
                _curve(axes, [[its["chance"] for its in one] for one in curves], colour, "")
            task = seeds[0]["trained_on"]
            axes.set_title(f"{task}: {kind['kind'].rpartition('.')[2]}", loc="left", fontsize=10)
            axes.set_ylim(0, 1.02)
            axes.grid()
        row[0].set_ylabel("share held")
    for axes in panels[-1]:
        axes.set_xlabel("k")
    panels[0, 0].plot([], [], "--", color=DARK, linewidth=1.2, label="by chance")
    _legend(figure, panels[0, 0])
    return svg(figure, title)


def _curve(axes: Axes, seeds: Sequence[Sequence[float]], colour: str, name: str) -> None:
    """The mean over the seeds; without a name it is chance's, and dashed."""
    values = [statistics.fmean(its) for its in zip(*seeds, strict=True)]
    style: dict[str, Any] = {"label": name} if name else {"linestyle": (0, (4, 3))}
    axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=1.5, **style)


def _by_task(groups: Sequence[Seeds]) -> dict[str, list[Seeds]]:
    found: dict[str, list[Seeds]] = {}
    for seeds in groups:
        found.setdefault(seeds[0]["trained_on"], []).append(seeds)
    return found


def _figure(title: str, size: tuple[float, float]) -> Figure:
    figure = Figure(
        figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08), facecolor="white"
    )
    figure.suptitle(title, x=0.013, ha="left", fontsize=11, fontweight="bold", color=DARK)
    return figure


def _legend(figure: Figure, axes: Axes) -> None:
    handles: dict[str, Any] = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=4, fontsize=9)
