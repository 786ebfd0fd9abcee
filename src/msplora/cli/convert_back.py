"""`msplora convert --to msplora`: the nearest pyramid for an adapter, and how near it is."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from .plan import names, numbers

if TYPE_CHECKING:
    from rich.table import Table

    from msplora.explained import Explained
    from msplora.from_lora import Fitted


class Shape(NamedTuple):
    """The pyramid asked for, as it is written on the command line."""

    r: int | None
    ranks: str | None
    groups: str | None
    levels: str | None


class BaseArguments(NamedTuple):
    """How to load the base."""

    source: str | None
    revision: str | None
    trust_remote_code: bool


def refuse_for(target: str, shape: Shape, data: str | None, as_json: bool) -> None:
    """Refuse options that say something of a pyramid where none is made."""
    options: dict[str, Any] = {**shape._asdict(), "data": data, "json": as_json or None}
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise typer.BadParameter(f"{', '.join(given)}: for --to msplora only, not --to {target}")


def to_pyramid(
    source: Path,
    out: Path,
    shape: Shape,
    *,
    base: BaseArguments,
    dtype: Any,
    data: str | None,
    verify: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Convert, and print the share of every update that the pyramid explains."""
    from msplora.from_lora import to_msplora
    from msplora.loading import BaseOptions

    with warnings.catch_warnings():
        # Deprecations within the libraries are not for users to read.
        warnings.simplefilter("ignore", FutureWarning)
        found = to_msplora(
            source,
            out,
            r=shape.r,
            ranks=numbers(shape.ranks),
            groups=numbers(shape.groups),
            levels=None if shape.levels is None else names(shape.levels),
            base=BaseOptions(base.source, "auto", base.revision, base.trust_remote_code),
            dtype=dtype,
            data=data,
            verify=verify,
            force=force,
        )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _show(found)


def _show(found: Fitted) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    for stack in dict.fromkeys(its.stack for its in found.sites):
        console.print(_table([its for its in found.sites if its.stack == stack]))
    lowest = min(found.sites, key=lambda its: its.share)
    console.print(
        f"The pyramid explains [bold]{found.explained:.2%}[/] of the squared norm of the updates; "
        f"least, {lowest.share:.2%}, of {lowest.site}."
    )
    fewer = found.parameters / found.source_parameters
    console.print(
        f"{found.parameters:,} numbers, {fewer:.0%} of the adapter's {found.source_parameters:,}. "
        f"{found.sweeps} sweeps of alternating least squares"
        + ("." if found.converged else ", which had not settled yet.")
    )
    if found.left_out:
        console.print(f"{len(found.left_out)} weights that the adapter leaves alone have no pairs.")
    if found.loss is not None:
        console.print(f"Loss on the data: {found.loss[0]:.4f} before, {found.loss[1]:.4f} after.")
    comparison = found.comparison
    if comparison is None:
        console.print("[yellow]Not checked[/] (--no-verify).")
    elif math.isinf(comparison.tolerance):
        console.print(
            f"[green]Checked[/]: PEFT loads what was found. Its logits differ by up to "
            f"{comparison.difference:.2e} from the source's, which moves them by up to "
            f"{comparison.effect:.2e}."
        )
    else:
        console.print(f"[green]Checked[/]: {comparison}.")
    console.print(
        f"Wrote {found.out} ({found.out_bytes:,} bytes; the adapter has {found.source_bytes:,})."
    )


def _table(sites: list[Explained]) -> Table:
    """The explained shares of one stack: a row for each block, a column for each kind."""
    from rich.markup import escape
    from rich.table import Table

    kinds = list(dict.fromkeys(its.kind for its in sites))
    table = Table("block", *map(escape, kinds), title=f"explained: {escape(sites[0].stack)}")
    shares = {(its.block, its.kind): f"{its.share:.2%}" for its in sites}
    blocks = dict.fromkeys(its.block for its in sorted(sites, key=lambda its: its.block or 0))
    for column in table.columns:
        column.justify = "right"
    for block in blocks:
        cells = [shares.get((block, kind), "") for kind in kinds]
        table.add_row("" if block is None else str(block), *cells)
    return table
