"""`msplora doctor`: an adapter on its base, checked one thing at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .convert import DType

if TYPE_CHECKING:
    from msplora.diagnosis.results import Diagnosis

_MARKS = {
    "passed": "[green]✓[/]",
    "failed": "[bold red]✗[/]",
    "warning": "[yellow]![/]",
    "skipped": "[dim]–[/]",
}


def doctor(
    model: Annotated[str, typer.Argument(help="The base: a model's folder, or its id on the hub.")],
    adapter: Annotated[
        Path, typer.Argument(help="The folder of the adapter (MSPLoRA or LoRA), or of a run.")
    ],
    data: Annotated[
        str | None,
        typer.Option(help="Rows to run on, as eval takes them; else random inputs from a seed."),
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Load the base in this dtype; as stored by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    revision: Annotated[str | None, typer.Option(help="Of the base model on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run Python code that the base model brings along.")
    ] = False,
) -> None:
    """Check that an adapter is applied, merges, comes off again and survives half precision.

    Loads the base. Exits with 1 where a check fails; warnings leave it at 0.
    """
    from msplora.diagnosis.doctoring import doctor as examine
    from msplora.loading import BaseOptions

    from .progress_bar import progress_bar

    stored = "auto" if dtype is None else dtype.value
    options = BaseOptions(model, stored, revision, trust_remote_code)
    with progress_bar() as progress:
        found = examine(options, adapter, data=data, progress=progress)
    if as_json:
        typer.echo(found.to_json(), nl=False)
    else:
        _print(found)
    if not found.ok:
        raise typer.Exit(1)


def _print(found: Diagnosis) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(
        f"{found.adapter} ({found.method}) on {found.model} in {found.dtype}, on {found.inputs}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("", "check", "found, and what to do"):
        table.add_column(name)
    for check in found.checks:
        advice = f"\n[bold]→ {escape(check.advice)}[/]" if check.advice else ""
        table.add_row(_MARKS[check.status], escape(check.name), escape(check.said) + advice)
    console.print(table)
    failed = [check.name for check in found.checks if check.status == "failed"]
    verdict = (
        f"[bold red]✗[/] failed: {', '.join(failed)}" if failed else "[green]✓[/] no check failed"
    )
    console.print(verdict, highlight=False, soft_wrap=True)
