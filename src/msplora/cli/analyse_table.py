"""An analysis on the terminal: tables of levels, of layers' likeness and of the data's; notes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from msplora.analysis.results import AdapterResult, Analysis, Comparison, KindResult

_FEW = (
    "Of many experts three are shown: those with the smallest, the median and the largest update. "
    "--json has all."
)
_FEW_COMPARED = (
    "Of many experts three are shown: the least alike, the median and the most alike. --json has "
    "all."
)


def print_analysis(analysis: Analysis, console: Console) -> None:
    """For each adapter its tables and notes, then how alike the adapters are."""
    from msplora.analysis.experts import compared

    for adapter in analysis.adapters:
        for table in _tables(adapter):
            console.print(table)
            console.print()
        few = len(_shown(adapter)) < len(adapter.kinds)
        _print_notes((*adapter.notes, *([_FEW] if few else [])), console)
    for comparison in analysis.comparisons:
        console.print(_comparison(comparison))
        console.print()
        few = len(compared(comparison.kinds)) < len(comparison.kinds)
        _print_notes((*comparison.notes, *([_FEW_COMPARED] if few else [])), console)


def _tables(adapter: AdapterResult) -> Iterator[Table]:
    yield _levels(adapter)
    if len(adapter.levels) > 1:
        yield _between_levels(adapter)
    yield _between_layers(adapter)
    if any(kind.relative_norm is not None for kind in adapter.kinds):
        yield _against_the_base(adapter)
    if adapter.ablation is not None:
        yield _ablation(adapter)


def _shown(adapter: AdapterResult) -> list[KindResult]:
    """The kinds that have a row: of many experts of one weight three, as on the page."""
    from msplora.analysis.experts import drawn

    return drawn(adapter, [adapter])


def _print_notes(notes: tuple[str, ...], console: Console) -> None:
    from rich.markup import escape

    for note in notes:
        console.print(f"[dim]·[/] {escape(note)}", soft_wrap=True, highlight=False)


def _table(title: str, *columns: str, caption: str | None = None) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(title),
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0),
    )
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", overflow="fold")
    return table


def _levels(adapter: AdapterResult) -> Table:
    table = _table(
        f"{adapter.name} ({adapter.method}, {adapter.parameters:,} parameters)",
        *("level", "rank", "‖s·BA‖", "share", "effective rank", "stable rank"),
    )
    for level in adapter.levels:
        table.add_row(
            level.level,
            str(level.rank),
            f"{level.norm:.4g}",
            percent(level.share),
            number(level.effective_rank),
            number(level.stable_rank),
        )
    return table


def _between_levels(adapter: AdapterResult) -> Table:
    table = _table("within the coarser levels", "level", "columns", "random", "rows", "random")
    for level in adapter.levels[1:]:
        columns, rows = adapter.inside_coarser(level.level)
        random_columns, random_rows = adapter.random_inside_coarser(level.level)
        shares = columns, random_columns, rows, random_rows
        table.add_row(level.level, *map(percent, shares))
    return table


def _between_layers(adapter: AdapterResult) -> Table:
    from rich.markup import escape

    table = _table(
        "between layers",
        *("kind", "layers", "cosine", "columns", "random", "rows", "random"),
        *("one pair\nexplains", "random"),  # rich would fold the names first
        caption="random: spaces of these ranks; one pair of updates with these singular values",
    )
    for kind in _shown(adapter):
        cosine, columns, rows = kind.likeness()
        random, shared = kind.similarity, kind.shared
        shares = (
            cosine,
            columns,
            random.random_columns if random else None,
            rows,
            random.random_rows if random else None,
            shared.pair[-1] if shared else None,
            shared.random_pair[-1] if shared else None,
        )
        table.add_row(escape(kind.name), str(len(kind.sites)), *map(percent, shares))
    return table


def _against_the_base(adapter: AdapterResult) -> Table:
    from rich.markup import escape

    table = _table("against the base", "kind", "‖ΔW‖ / ‖W₀‖", "intruders")
    for kind in _shown(adapter):
        found = kind.intruders
        of = "–" if found is None else f"{found[0]} of {found[1]}"
        table.add_row(escape(kind.name), percent(kind.relative_norm), of)
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

    from msplora.analysis.experts import compared
    from msplora.analysis.results import mean

    table = _table(
        f"{comparison.first} against {comparison.second}, mean over the layers",
        *("kind", "layers", "cosine", "columns", "random", "rows", "random"),
    )
    for kind in compared(comparison.kinds):
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
