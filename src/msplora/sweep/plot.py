"""The plot of a sweep: the metric over the learning rate where that is swept, else by setting.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and a shape goes with each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import blended_transform_factory

from .naming import short_keys, shown
from .reading import Parameters, Sweep
from .settings_tried import METHOD, Setting, rank

RATE = "training.learning_rate"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#999999")
_SHAPES = "osD^vPX*"
_DOTS_AT_MOST = 40
_GREY = "#7A7A7A"
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
    series = _series(sweep, settings)
    figure, axes = _figure(8, 4.8)
    axes.set_xscale("log")
    rates = sorted({setting.parameters[RATE] for setting in settings})
    # A little apart, so that the spreads of two series at one rate are both seen.
    apart = 1.02 if len(series) > 1 else 1.0
    bottoms = blended_transform_factory(axes.transData, axes.transAxes)
    for place, (name, its) in enumerate(series.items()):
        colour, shape = _COLOURS[place % len(_COLOURS)], _SHAPES[place % len(_SHAPES)]
        shift = apart ** (place - (len(series) - 1) / 2)
        done = sorted(
            (one for one in its if one.values), key=lambda one: (one.parameters[RATE], rank(one))
        )
        line = "-" if _is_curve(done) and RATE in sweep.settings.grid else ""
        _dots(
            axes,
            [one.parameters[RATE] * shift for one in done],
            done,
            colour=colour,
            shape=shape,
            line=line,
            label=name,
        )
        bad = [one.parameters[RATE] * shift for one in its if one.having("diverged")]
        axes.plot(
            bad,
            [0.02 + 0.03 * (place % 3)] * len(bad),
            "x",
            color=colour,
            transform=bottoms,
            clip_on=False,
            markeredgewidth=2,
        )
    if any(setting.having("diverged") for setting in settings):
        axes.plot([], [], "x", color=_GREY, markeredgewidth=2, label="diverged")
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.1 * (high - low), high)
    axes.set(xlabel="learning rate", ylabel=_metric(sweep, settings))
    if len(rates) <= 8:
        axes.set_xticks(rates)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    if axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside upper left", ncols=4, fontsize=9)
    return figure


def _by_setting(sweep: Sweep, settings: Sequence[Setting]) -> Figure:
    """One line per setting, the best at the top."""
    done = sorted((its for its in settings if its.values), key=rank)[:_DOTS_AT_MOST]
    figure, axes = _figure(8, 1.6 + 0.28 * len(done))
    methods = list(dict.fromkeys(its.method for its in settings))
    for place, setting in enumerate(done):
        which = methods.index(setting.method)
        colour, shape = _COLOURS[which % len(_COLOURS)], _SHAPES[which % len(_SHAPES)]
        values = setting.values
        axes.plot([min(values), max(values)], [place, place], color=colour, linewidth=1.5)
        axes.plot(values, [place] * len(values), "|", color=colour, markersize=8)
        axes.plot(sum(values) / len(values), place, shape, color=colour)
    axes.set_yticks(range(len(done)), [_name(its.parameters, sweep.swept) for its in done])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(_metric(sweep, settings))
    return figure


def _dots(
    axes: Axes,
    rates: list[float],
    settings: list[Setting],
    *,
    colour: str,
    shape: str,
    line: str,
    label: str,
) -> None:
    means = [sum(its.values) / len(its.values) for its in settings]
    below = [at - min(its.values) for at, its in zip(means, settings, strict=True)]
    above = [max(its.values) - at for at, its in zip(means, settings, strict=True)]
    spread: Any = [below, above] if any(len(its.values) > 1 for its in settings) else None
    axes.errorbar(
        rates,
        means,
        yerr=spread,
        color=colour,
        marker=shape,
        linestyle=line,
        capsize=3,
        elinewidth=1.2,
        label=label,
    )


def _series(sweep: Sweep, settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """Label -> settings that differ in the rate only; by method alone where these are too many."""
    others = [key for key in sweep.swept if key != RATE]
    names = {_name(its.parameters, others) for its in settings}
    if len(names) > len(_COLOURS):
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


def _is_curve(settings: list[Setting]) -> bool:
    """Whether there is one setting for each rate."""
    rates = [its.parameters[RATE] for its in settings]
    return len(set(rates)) == len(rates)


def _metric(sweep: Sweep, settings: Sequence[Setting]) -> str:
    metric = next((row.metric for its in settings for row in its.complete), None) or "metric"
    seeds = sweep.settings.seeds or []
    spread = f"\nmean of {len(seeds)} seeds, lowest to highest" if len(seeds) > 1 else ""
    return f"held-out {metric}{spread}"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no global state of pyplot's
    return figure, figure.add_subplot()
