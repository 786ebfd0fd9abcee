"""The charts of the page's sections."""

from __future__ import annotations

from collections.abc import Sequence

from .charts import Chart, Series, line_chart, style_of
from .experts import Weight, compared, named, norm
from .results import (
    AdapterResult,
    Comparison,
    KindComparison,
    KindResult,
    LevelOverlap,
    Measures,
    Number,
    SiteResult,
)

_SUM = "sum of all"
"""Of a layer's levels; none of them can be called so."""


def layers_of(kind: KindResult) -> list[int]:
    """The numbers of a kind's blocks; 0 outside every list of blocks."""
    return [site.layer or 0 for site in kind.sites]


Adapters = Sequence[AdapterResult]
"""All of a page: a chart has the scale of those of the same kind that stand beside it."""


def _sites(kind: KindResult, adapters: Adapters) -> list[SiteResult]:
    """The sites of a kind, and of those of its name in all adapters."""
    beside = [its for adapter in adapters for its in named(adapter, kind.name)]
    return [site for its in (kind, *beside) for site in its.sites]


def _measures(kind: KindResult, adapters: Adapters) -> list[Measures]:
    """Of the updates of these sites and their levels."""
    return [its for site in _sites(kind, adapters) for its in (site.update, *site.levels.values())]


def norms(kind: KindResult, levels: Sequence[str], adapters: Adapters = ()) -> Chart:
    """The norm of every level's update, layer by layer."""
    series = [
        Series(level, [site.levels[level].norm for site in kind.sites], style_of(place))
        for place, level in enumerate(levels)
    ]
    if len(levels) > 1:
        series.append(Series(_SUM, [site.update.norm for site in kind.sites], "ref"))
    beside = [its.norm for its in _measures(kind, adapters)]
    title = f"{kind.name}: norm"
    return line_chart(title, "layer", "‖s·BA‖", layers_of(kind), series, beside=beside)


def effective_ranks(kind: KindResult, levels: Sequence[str], adapters: Adapters = ()) -> Chart:
    """The effective rank of every level's update, layer by layer."""
    series = [
        Series(level, [site.levels[level].effective_rank for site in kind.sites], style_of(place))
        for place, level in enumerate(levels)
    ]
    if len(levels) > 1:
        series.append(Series(_SUM, [site.update.effective_rank for site in kind.sites], "ref"))
    beside = [its.effective_rank for its in _measures(kind, adapters)]
    title = f"{kind.name}: effective rank"
    return line_chart(title, "layer", "effective rank", layers_of(kind), series, beside=beside)


def figures(kind: KindResult, levels: Sequence[str]) -> list[tuple[str, str, Measures]]:
    """The rows of a kind's table: of every layer each level, and their sum where they are several.

    Returns:
        The names of the layer and the level, and their figures.
    """
    rows = []
    for site in kind.sites:
        layer = site.key if site.layer is None else str(site.layer)
        rows += [(layer, level, site.levels[level]) for level in levels]
        rows += [(layer, _SUM, site.update)] if len(levels) > 1 else []
    return rows


def experts(weight: Weight) -> Chart:
    """The norm of every expert's update, over the layers."""
    values: list[Number] = [norm(kind) for kind in weight.kinds]
    series = [Series("root mean square over the layers", values, "c0")]
    places = range(len(values))
    return line_chart(f"{weight.name}: norm by expert", "expert", "‖s·BA‖", places, series)


def spectra(kind: KindResult, levels: Sequence[str], adapters: Adapters = ()) -> list[Chart]:
    """The singular values of the sum and of every level: one line per layer."""
    whole = "update" if len(levels) == 1 else "sum of the levels"
    beside = [value for its in _measures(kind, adapters) for value in its.singular_values]
    totals = [site.update.singular_values for site in kind.sites]
    charts = [_spectrum(kind, whole, totals, beside)]
    if len(levels) > 1:
        charts += [
            _spectrum(
                kind, level, [site.levels[level].singular_values for site in kind.sites], beside
            )
            for level in levels
        ]
    return charts


def _spectrum(
    kind: KindResult, what: str, values: Sequence[Sequence[float]], beside: Sequence[float]
) -> Chart:
    last = max(len(kind.sites) - 1, 1)
    series = [
        Series(_name(site), its, "shaded", place / last)
        for place, (site, its) in enumerate(zip(kind.sites, values, strict=True))
    ]
    places = range(1, max(map(len, values)) + 1)
    title = f"{kind.name}: {what}"
    return line_chart(title, "k", "k-th singular value", places, series, log=True, beside=beside)


def _name(site: SiteResult) -> str:
    return site.key if site.layer is None else f"layer {site.layer}"


def angles(kind: KindResult) -> Chart | None:
    """The cosines of the principal angles between layers, mean over the pairs of layers."""
    found = kind.similarity
    if found is None:
        return None
    series = [
        Series("columns", found.principal_columns, "c0"),
        Series("rows", found.principal_rows, "c1"),
        Series("random columns", found.random_principal_columns, "c0 chance"),
        Series("random rows", found.random_principal_rows, "c1 chance"),
    ]
    places = range(1, max(len(its.values) for its in series) + 1)
    title = f"{kind.name}: principal angles between layers"
    return line_chart(title, "k", "cosine of the k-th", places, series, share=True)


def explained(kind: KindResult) -> Chart | None:
    """How much of all layers' updates one shared space, or pair, explains."""
    found = kind.shared
    if found is None:
        return None
    series = [
        Series("shared columns", found.columns, "c0"),
        Series("shared rows", found.rows, "c1"),
        Series("one shared pair", found.pair, "c2"),
        Series("random columns", found.random_columns, "c0 chance"),
        Series("random rows", found.random_rows, "c1 chance"),
        Series("a pair of random updates", found.random_pair, "c2 chance"),
    ]
    places = range(1, max(len(its.values) for its in series) + 1)
    title = f"{kind.name}: one shared space for all layers"
    return line_chart(title, "rank k", "share explained", places, series, share=True)


def inside_coarser(kind: KindResult, levels: Sequence[str]) -> Chart | None:
    """How much of the last level lies in the span of all before it, layer by layer."""
    if len(levels) < 2:
        return None
    of = tuple(levels[:-1])
    (found,) = [its for its in kind.decoupling if its.level == levels[-1] and its.of == of]
    layers = layers_of(kind)
    series = [
        Series("columns", found.columns, "c0"),
        Series("rows", found.rows, "c1"),
        *_by_chance(found, len(layers)),
    ]
    title = f"{kind.name}: {levels[-1]} within {' + '.join(of)}"
    return line_chart(title, "layer", "share of the square", layers, series, share=True)


def relative_norms(kind: KindResult, adapters: Adapters = ()) -> Chart | None:
    """‖ΔW‖ / ‖W0‖, layer by layer."""
    if kind.relative_norm is None:
        return None
    values = [site.relative_norm for site in kind.sites]
    series = [Series("‖ΔW‖ / ‖W₀‖", values, "c0")]
    beside = [site.relative_norm for site in _sites(kind, adapters)]
    title = f"{kind.name}: relative norm"
    return line_chart(title, "layer", "‖ΔW‖ / ‖W₀‖", layers_of(kind), series, beside=beside)


def intruders(kind: KindResult, adapters: Adapters = ()) -> Chart | None:
    """How many of the leading singular vectors are new, layer by layer."""
    if kind.intruders is None:
        return None
    values, beside = (
        [None if site.intruders is None else site.intruders.count for site in sites]
        for sites in (kind.sites, _sites(kind, adapters))
    )
    series = [Series("intruders", values, "c2")]
    title = f"{kind.name}: intruder dimensions"
    return line_chart(title, "layer", "number", layers_of(kind), series, beside=beside)


def over_training(adapter: AdapterResult, adapters: Adapters = ()) -> list[Chart]:
    """What the checkpoints were like, one small chart per figure."""
    steps = [its.step for its in adapter.history]
    levels = [its.level for its in adapter.levels]

    def chart(title: str, label: str, attribute: str, share: bool = False) -> Chart:
        series = [
            Series(
                level,
                [getattr(its.levels[place], attribute) for its in adapter.history],
                style_of(place),
            )
            for place, level in enumerate(levels)
        ]
        checkpoints = [its for one in adapters for its in one.history]
        beside = [getattr(its, attribute) for point in checkpoints for its in point.levels]
        return line_chart(title, "step", label, steps, series, share=share, beside=beside)

    charts = [
        chart("norm, root mean square", "‖s·BA‖", "norm"),
        chart("effective rank, mean", "effective rank", "effective_rank"),
        chart("stable rank, mean", "stable rank", "stable_rank"),
    ]
    if len(levels) > 1:
        charts.insert(1, chart("share of the squares", "share", "share", share=True))
        series = [
            Series("columns", [its.coarser_columns for its in adapter.history], "c0"),
            Series("rows", [its.coarser_rows for its in adapter.history], "c1"),
        ]
        title = f"{levels[-1]} within {' + '.join(levels[:-1])}"
        charts.append(line_chart(title, "step", "share", steps, series, share=True))
    return charts


def side_by_side(comparison: Comparison) -> list[Chart]:
    """How alike two adapters' updates of each weight are, one chart per kind."""
    charts = []
    for kind in compared(comparison.kinds):
        series = [
            Series("cosine", kind.cosine, "c2"),
            Series("columns", kind.columns, "c0"),
            Series("rows", kind.rows, "c1"),
            *_by_chance(kind, len(kind.layers)),
        ]
        layers = [its or 0 for its in kind.layers]
        charts.append(line_chart(kind.kind, "layer", "likeness", layers, series, share=True))
    return charts


def _by_chance(found: LevelOverlap | KindComparison, layers: int) -> list[Series]:
    """What columns and rows would be of random updates: a line of the same colour for each."""
    return [
        Series("random columns", [found.random_columns] * layers, "c0 chance"),
        Series("random rows", [found.random_rows] * layers, "c1 chance"),
    ]
