"""`msplora eval`: measure a saved model on held-out rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder, or adapter folder.")],
    data: Annotated[
        str | None,
        typer.Option(help="Labelled file or folder; else the rows its run held out."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model, where the recorded one has moved.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows per step.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure a run or an adapter: a classifier's metrics, a loss per token or of pairs."""
    from msplora.extras import train_extra

    with train_extra():
        from msplora.train.evaluation import evaluate_run
        from msplora.train.lengths import LEFT_OUT

        found = evaluate_run(run, data, base, batch_size)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("metric", "value", title=escape(str(run)))
    table.columns[1].justify = "right"
    for name, value in found.items():
        if name != "run":
            table.add_row(
                LEFT_OUT.get(name, name), f"{value:.4f}" if isinstance(value, float) else str(value)
            )
    Console().print(table)
