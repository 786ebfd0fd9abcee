"""The plot of a sweep: the metric over the learning rate where that is swept, else by setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from matplotlib.transforms import blended_transform_factory

from msplora.page.plotting import COLOURS, mark_of

from .best import marked, not_comparable
from .naming import short_keys, shown
from .reading import Parameters, Sweep
from .settings_tried import METHOD, Setting, rank

RATE = "training.learning_rate"
_DOTS_AT_MOST = 40
_GREY = "#7A7A7A"
_RING: dict[str, Any] = {
    "linestyle": "",
    "marker": "o",
    "markersize": 12,
    "color": "#333333",
    "fillstyle": "none",
}
_CROSS: dict[str, Any] = {
    "linestyle": "",
    "marker": "x",
    "markeredgewidth": 2,
    "color": _GREY,
    "clip_on": False,
}
_STYLE = {
    "text.parse_math": False,  # names come from files
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
}


def draw_sweep(sweep: Sweep, settings: Sequence[Setting], file: Path) -> None:
    """Draw every setting that has a complete run, with the spread of its seeds."""
    with matplotlib.style.context(["default", _STYLE]):
        if RATE in sweep.swept:
            figure = _over_the_rate(sweep, settings)
        else:
            figure = _by_setting(sweep, settings)
        figure.savefig(file, dpi=150)


def _over_the_rate(sweep: Sweep, settings: Sequence[Setting]) -> Figure:
    figure, axes = _figure(8, 4.8)
    axes.set_xscale("log")
    series = _series(sweep, settings)
    bests = marked(list(settings))
    handles: list[Any] = []
    for place, (name, its) in enumerate(series.items()):
        # A little apart, so that the spreads of two series at one rate are both seen.
        shift = 1.02 ** (place - (len(series) - 1) / 2)
        style = mark_of(place)
        handles.append(_curve(axes, its, shift, name, style, RATE in sweep.settings.grid))
        best = [one for one in its if any(one is found for found, _ in bests)]
        axes.plot([_rate(one) * shift for one in best], [_mean(one) for one in best], **_RING)
        bad = [_rate(one) * shift for one in its if one.having("diverged")]
        axes.plot(
            bad,
            [0.02 + 0.03 * (place % 3)] * len(bad),
            **{**_CROSS, "color": style["color"]},
            transform=blended_transform_factory(axes.transData, axes.transAxes),
        )
    if bests:
        label = "best of its method" if len(bests) > 1 else "best"
        if not_comparable(list(settings)):
            label = "best of those scored alike"
        handles += axes.plot([], [], label=label, **_RING)
    if any(setting.having("diverged") for setting in settings):
        handles += axes.plot([], [], label="diverged", **_CROSS)
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.1 * (high - low), high)  # room for the crosses
    axes.set(xlabel="learning rate", ylabel=_metric(sweep, settings))
    if settings:  # none yet of a search that was stopped at once
        _label_rates(axes, sorted({_rate(setting) for setting in settings}))
        figure.legend(handles=handles, loc="outside upper left", ncols=5, fontsize=9)
    return figure


def _curve(
    axes: Axes,
    settings: Sequence[Setting],
    shift: float,
    label: str,
    style: dict[str, Any],
    has_line: bool,
) -> Any:
    """A series: its means and spreads, and a line through the best at each rate."""
    done = sorted((its for its in settings if its.values), key=rank)
    rates = [_rate(its) * shift for its in done]
    means = [_mean(its) for its in done]
    below = [mean - min(its.values) for mean, its in zip(means, done, strict=True)]
    above = [max(its.values) - mean for mean, its in zip(means, done, strict=True)]
    if any(below + above):
        spread: Any = [below, above]
        axes.errorbar(
            rates, means, spread, fmt="none", capsize=3, elinewidth=1.2, ecolor=style["color"]
        )
    (handle,) = axes.plot(rates, means, linestyle="", label=label, zorder=3, **style)
    part = [place for place, its in enumerate(done) if not its.is_whole]
    axes.plot(
        [rates[place] for place in part],
        [means[place] for place in part],
        linestyle="",
        markerfacecolor="white",  # not all of its seeds
        zorder=3,
        **style,
    )
    if has_line:
        best: dict[float, float] = {}
        for rate, mean in zip(rates, means, strict=True):
            best.setdefault(rate, mean)  # sorted: the first is the best
        line = sorted(best.items())
        axes.plot([rate for rate, _ in line], [mean for _, mean in line], color=style["color"])
    return handle


def _label_rates(axes: Axes, rates: list[float]) -> None:
    """The rates themselves below the axis, where they are few and apart."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    margin = max((rates[-1] / rates[0]) ** 0.04, 1.1)
    axes.set_xlim(rates[0] / margin, rates[-1] * margin)
    places = [math.log(rate) for rate in rates]
    width = max(places[-1] - places[0], 1e-9)
    if all(next_ - its > 0.09 * width for its, next_ in pairwise(places)):
        axes.set_xticks(rates)
        axes.xaxis.set_minor_locator(NullLocator())


def _by_setting(sweep: Sweep, settings: Sequence[Setting]) -> Figure:
    """One line per setting, the best at the top."""
    done = sorted((its for its in settings if its.values), key=rank)[:_DOTS_AT_MOST]
    figure, axes = _figure(8, 1.6 + 0.28 * len(done))
    methods = list(dict.fromkeys(its.method for its in settings))
    for place, setting in enumerate(done):
        which = methods.index(setting.method)
        colour, shape = mark_of(which).values()
        values = setting.values
        axes.plot([min(values), max(values)], [place, place], color=colour, linewidth=1.5)
        axes.plot(values, [place] * len(values), "|", color=colour, markersize=8)
        axes.plot(_mean(setting), place, shape, color=colour)
    axes.set_yticks(range(len(done)), [_name(its.parameters, sweep.swept) for its in done])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(_metric(sweep, settings))
    return figure


def _series(sweep: Sweep, settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """Label -> settings that differ in the rate only; by method alone where these are too many."""
    others = [key for key in sweep.swept if key != RATE]
    names = {_name(its.parameters, others) for its in settings}
    if len(names) > len(COLOURS):
        others = [key for key in others if key == METHOD]
    found: dict[str, list[Setting]] = {}
    for setting in settings:
        found.setdefault(_name(setting.parameters, others), []).append(setting)
    return found


def _name(parameters: Parameters, keys: Sequence[str]) -> str:
    short = short_keys(keys)
    parts = [
        shown(parameters[key]) if key == METHOD else f"{short[key]} {shown(parameters[key])}"
        for key in keys
    ]
    return ", ".join(parts) or "all runs"


def _rate(setting: Setting) -> float:
    return float(setting.parameters[RATE])  # which may stand in quotes in the file


def _mean(setting: Setting) -> float:
    return sum(setting.values) / len(setting.values)


def _metric(sweep: Sweep, settings: Sequence[Setting]) -> str:
    metric = next((row.metric for its in settings for row in its.complete), None) or "metric"
    seeds = sweep.settings.seeds or []
    spread = f"\nmean of {len(seeds)} seeds, lowest to highest" if len(seeds) > 1 else ""
    why_not = not_comparable(list(settings))
    return f"held-out {metric}{spread}" + (f"\n{why_not}" if why_not else "")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no global state of pyplot's
    return figure, figure.add_subplot()
