"""The plots of a bake-off: score against size, differences from the baseline, rates."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from msplora.page.plotting import DARK, MIDDLE, SETTINGS, mark_of, svg

from .bake_off import Outcome
from .rejecting import best_until_then
from .statistics import Standing


def draw_front(outcome: Outcome, found: Sequence[Standing]) -> bytes:
    """Score against trainable numbers, with the standard deviation of the seeds. The mean of a
    method that lacks runs is of the seeds that it has, and its mark is hollow.
    """
    title = "Score against size"
    with matplotlib.style.context(["default", SETTINGS]):
        figure, axes = _figure(7, 4.2)
        order = list(outcome.prepared.bake_off.entrants)
        shown = [(its, its.overall) for its in found if its.overall]
        for standing, overall in shown:
            axes.errorbar(
                standing.size,
                overall.mean,
                overall.deviation or 0.0,
                capsize=3,
                linestyle="",
                label=standing.name + (" (lacks runs)" if standing.missing else ""),
                **({"markerfacecolor": "white"} if standing.missing else {}),
                **mark_of(order.index(standing.name)),
            )
        front = sorted((its.size, of.mean) for its, of in shown if its.on_front)
        axes.plot(
            *zip(*front, strict=True) if front else ([], []),
            color=MIDDLE,
            linestyle=(0, (4, 3)),
            linewidth=1,
            drawstyle="steps-post",
            zorder=0,
            label="no smaller one is as good",
        )
        axes.set(xlabel="trainable numbers of the adapter", ylabel=_score_label(outcome))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
        axes.margins(0.12)
        axes.grid(visible=True)
        figure.legend(loc="outside upper left", ncols=3, fontsize=9)
        return svg(figure, title)


def draw_differences(outcome: Outcome, found: Sequence[Standing]) -> bytes:
    """Each entrant against the baseline: a mark per task, and the mean of these."""
    title = "Difference from the baseline"
    tasks = list(outcome.prepared.bake_off.settings.tasks)
    with matplotlib.style.context(["default", SETTINGS]):
        pairs = [(its.name, its.against) for its in found if its.against]
        figure, axes = _figure(7, 1.5 + 0.42 * len(pairs))
        for place, (_, paired) in enumerate(pairs):
            axes.plot(
                paired.differences,
                [place] * len(paired.differences),
                "|",
                color=MIDDLE,
                markersize=7,
                label="a task with a seed" if place == 0 else None,
            )
            for task, value in paired.by_task.items():
                axes.plot(
                    value,
                    place,
                    linestyle="",
                    markersize=5,
                    label=f"{task}, mean" if place == 0 else None,
                    **mark_of(tasks.index(task)),
                )
            label = "mean of all" if place == 0 else None
            axes.plot(
                [paired.mean] * 2, [place - 0.3, place + 0.3], color=DARK, linewidth=2, label=label
            )
        axes.axvline(0, color=MIDDLE, linewidth=1)
        axes.set_yticks(range(len(pairs)), [name for name, _ in pairs])
        axes.set_ylim(len(pairs) - 0.4, -0.6)
        baseline = outcome.prepared.bake_off.baseline
        axes.set_xlabel(f"better than {baseline} by ({_score_label(outcome)})")
        axes.grid(axis="x")
        figure.legend(loc="outside upper left", ncols=4, fontsize=9)
        return svg(figure, title)


def draw_rates(outcome: Outcome) -> bytes:
    """The metric over the learning rate, of all that rates were chosen on; one panel per task."""
    title = "Choosing the learning rate"
    bake_off = outcome.prepared.bake_off
    tasks = bake_off.choose_tasks
    with matplotlib.style.context(["default", SETTINGS]):
        figure = Figure(figsize=(3.9 * len(tasks) + 0.5, 3.8), layout="constrained")
        panels = figure.subplots(1, len(tasks), squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            _draw_task(axes, outcome, task)
        tried = [its for choice in outcome.choices.values() for its in choice.tried]
        if any(row.status == "rejected" for its in tried for row in its.rows):
            panels[0].plot(
                [],
                [],
                linestyle="",
                marker="o",
                color=MIDDLE,
                markerfacecolor="white",
                label="given up early, best until then",
            )
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, fontsize=9)
        return svg(figure, title)


def _draw_task(axes: Axes, outcome: Outcome, task: str) -> None:
    axes.set_xscale("log")
    metric = outcome.prepared.metrics[task]
    rates: set[float] = set()
    for place, (name, choice) in enumerate(outcome.choices.items()):
        whole, given_up = [], []
        for tried in choice.tried:
            rows = [row for row in tried.rows if row.parameters["task"] == task]
            rates.add(tried.rate)
            for row in rows:
                if row.status == "complete":
                    whole.append((tried.rate, row.value))
                elif row.status == "rejected":
                    given_up.append((tried.rate, best_until_then(row, metric)))
        mark = mark_of(place)
        axes.plot(*_columns(sorted(whole)), label=name, markersize=5, linewidth=1.2, **mark)
        axes.plot(
            *_columns(given_up),
            linestyle="",
            markersize=5,
            markerfacecolor="white",
            **mark,
        )
        if choice.best:
            chosen = [value for rate, value in whole if rate == choice.best.rate]
            axes.plot(
                [choice.best.rate] * len(chosen),
                chosen,
                linestyle="",
                marker="o",
                markersize=11,
                fillstyle="none",
                color=mark["color"],
            )
    axes.set(title=task, xlabel="learning rate", ylabel=f"held-out {metric}")
    axes.set_xticks(sorted(rates), [f"{rate:g}" for rate in sorted(rates)], rotation=45)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(visible=True)


def _columns(points: Sequence[tuple[float, float | None]]) -> tuple[list[float], list[float]]:
    return [rate for rate, _ in points], [value or 0.0 for _, value in points]


def _score_label(outcome: Outcome) -> str:
    metrics = dict.fromkeys(outcome.prepared.metrics.values())
    if len(outcome.prepared.metrics) == 1:
        return f"held-out {next(iter(metrics))}"
    return f"mean over the tasks ({', '.join(metrics)})"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()
