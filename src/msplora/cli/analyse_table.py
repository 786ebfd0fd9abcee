"""An analysis on the terminal: one table of levels, one of layers' likeness, one of the data's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from msplora.analysis.results import AdapterResult, Analysis, Comparison


def tables(analysis: Analysis) -> Iterator[Table]:
    """For each adapter its tables, then how alike the adapters are."""
    for adapter in analysis.adapters:
        yield _levels(adapter)
        yield _kinds(adapter)
        if adapter.ablation is not None:
            yield _ablation(adapter)
    for comparison in analysis.comparisons:
        yield _comparison(comparison)


def _table(title: str, *columns: str, caption: str | None = None) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), caption=caption, title_justify="left")
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", overflow="fold")
    return table


def _levels(adapter: AdapterResult) -> Table:
    table = _table(
        f"{adapter.name} ({adapter.method}, {adapter.parameters:,} parameters)",
        *("level", "rank", "‖s·BA‖", "share", "effective rank", "stable rank"),
        *("columns in the coarser", "rows"),
    )
    for level in adapter.levels:
        inside = adapter.inside_coarser(level.level)
        table.add_row(
            level.level,
            str(level.rank),
            f"{level.norm:.4g}",
            percent(level.share),
            number(level.effective_rank),
            number(level.stable_rank),
            percent(inside[0]),
            percent(inside[1]),
        )
    return table


def _kinds(adapter: AdapterResult) -> Table:
    from rich.markup import escape

    table = _table(
        "between layers",
        *("kind", "layers", "cosine", "columns", "rows", "one pair explains"),
        *("‖ΔW‖ / ‖W₀‖", "intruders"),
    )
    for kind in adapter.kinds:
        likeness = kind.likeness()
        pair = kind.shared.pair[-1] if kind.shared else None
        table.add_row(
            escape(kind.name),
            str(len(kind.sites)),
            percent(likeness[0]),
            percent(likeness[1]),
            percent(likeness[2]),
            percent(pair),
            percent(kind.relative_norm),
            "–" if kind.intruders is None else f"{kind.intruders[0]} of {kind.intruders[1]}",
        )
    return table


def _ablation(adapter: AdapterResult) -> Table:
    from rich.markup import escape

    ablation = adapter.ablation
    assert ablation is not None
    title = f"switched off, on {ablation.rows} rows of {ablation.data}"
    table = _table(title, "off", f"loss per {ablation.unit}", "change", "95 %")
    for run in ablation.runs:
        change = ("", "")
        if run.levels:
            change = f"{run.change:+.4f}", f"{run.low:+.4f} to {run.high:+.4f}"
        table.add_row(escape(" + ".join(run.levels) or "nothing"), f"{run.loss:.4f}", *change)
    return table


def _comparison(comparison: Comparison) -> Table:
    from rich.markup import escape

    from msplora.analysis.results import mean

    table = _table(
        f"{comparison.first} against {comparison.second}, mean over the layers",
        *("kind", "layers", "cosine", "columns", "random", "rows", "random"),
    )
    for kind in comparison.kinds:
        table.add_row(
            escape(kind.kind),
            str(len(kind.layers)),
            percent(mean(kind.cosine)),
            percent(mean(kind.columns)),
            percent(kind.random_columns),
            percent(mean(kind.rows)),
            percent(kind.random_rows),
        )
    return table


def percent(value: float | None) -> str:
    """A share, or a dash where it has no meaning."""
    return "–" if value is None else f"{value:.1%}"


def number(value: float | None) -> str:
    """A number, or a dash where it has no meaning."""
    return "–" if value is None else f"{value:.2f}"
