"""An inspection on the terminal: what it is, its levels, who shares, and what is suspicious."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .analyse_table import percent

if TYPE_CHECKING:
    from rich.table import Table

    from msplora.inspection.results import Inspection

_MARKS = {"problem": "[bold red]✗[/]", "warning": "[yellow]![/]", "note": "[dim]·[/]"}


def print_inspection(found: Inspection) -> None:
    """Print it all."""
    from rich.console import Console
    from rich.markup import escape

    from msplora.inspection.suspicions import UNEVEN

    console = Console()
    console.print(_summary(found))
    if found.levels:
        console.print(_levels(found))
        console.print(_kinds(found))
    for finding in found.findings:
        mark = _MARKS[finding.severity]
        rule = "" if finding.rule == "note" else f"[bold]{escape(finding.rule)}[/]: "
        console.print(f"{mark} {rule}{escape(finding.text)}", soft_wrap=True, highlight=False)
    # A note that pairs may be missing is no word of comfort.
    if not found.suspicious and not any(its.rule == UNEVEN for its in found.findings):
        console.print("[green]✓[/] Nothing suspicious.")


def _summary(found: Inspection) -> Table:
    from rich.markup import escape
    from rich.table import Table

    what = "a whole model" if found.what == "model" else f"an adapter of {found.what}"
    its = "" if found.found_as in ("adapter", "model") else f" ({found.found_as})"
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("what", escape(what + its))
    table.add_row("where", escape(found.weights))
    if found.what == "model":
        table.add_row("model", escape(f"{found.task or '?'} ({found.model_type or '?'})"))
    else:
        kind = f" ({found.model_type})" if found.model_type else ""
        table.add_row("base", escape(f"{found.base or 'not named'}{kind}"))
        table.add_row("task", escape(found.task or "not named"))
    files = ", ".join(f"{name} ({size:,} bytes)" for name, size in list(found.files.items())[:3])
    more = f" and {len(found.files) - 3} more" if len(found.files) > 3 else ""
    table.add_row("files", escape(files + more))
    stored = ", ".join(f"{count:,} in {dtype}" for dtype, count in found.dtypes.items())
    table.add_row("numbers", stored)
    if found.what != "model":
        others = f" and {found.other_parameters:,} others" if found.other_parameters else ""
        table.add_row("parameters", f"{found.parameters:,} in {len(found.pairs)} pairs{others}")
    return table


def _table(*columns: str, caption: str | None = None) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD,
        caption=caption,
        caption_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", overflow="fold")
    return table


def _levels(found: Inspection) -> Table:
    table = _table(
        *("level", "groups", "rank", "scale", "pairs", "parameters", "‖s·BA‖", "share"),
        "largest",
        caption="‖s·BA‖: over the adapted weights, root mean square. largest: of a pair, over "
        "√min(out, in)",
    )
    for level in found.levels:
        table.add_row(
            level.level,
            "per layer" if level.groups == 0 else str(level.groups),
            str(level.rank),
            f"{level.scale:.4g}",
            str(level.pairs),
            f"{level.parameters:,}",
            "–" if level.norm is None else f"{level.norm:.4g}",
            percent(level.share),
            percent(level.largest),
        )
    return table


def _kinds(found: Inspection) -> Table:
    from rich.markup import escape

    table = _table("kind", "shape", "layers", "shared by", "rank", "parameters")
    for kind in found.kinds:
        known = kind.layers is not None
        sizes = " | ".join(_sizes(its) for its in kind.group_sizes) if known else "?"
        table.add_row(
            escape(kind.kind),
            f"{kind.out_features}x{kind.in_features}",
            str(kind.layers) if known else "?",
            sizes,
            "+".join(map(_range, kind.lowest_ranks, kind.ranks)),
            f"{kind.parameters:,}",
        )
    return table


def _range(low: int, high: int) -> str:
    return str(high) if low == high else f"{low}–{high}"


def _sizes(counts: tuple[int, ...]) -> str:
    from msplora.plan_text import repeated

    return repeated(counts) if any(counts) else "1"
