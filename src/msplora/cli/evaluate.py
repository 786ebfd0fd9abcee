"""`msplora eval`: measure a saved model on held-out rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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
    harness: Annotated[
        str | None,
        typer.Option(
            metavar="TASKS",
            help="Tasks of lm-evaluation-harness, separated by commas, in place of held-out rows.",
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --harness: a folder of your own tasks.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows per step.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure a run or an adapter: a classifier's metrics, a loss per token or of pairs."""
    from msplora.extras import harness_extra, train_extra

    if harness and data:
        raise typer.BadParameter("--harness brings its own rows: leave --data out.")
    if include_path and not harness:
        raise typer.BadParameter("--include-path is for --harness: say which tasks.")
    with train_extra():
        from msplora.train.lengths import LEFT_OUT

        if harness:
            with harness_extra():
                from msplora.train.harness import judge

            tasks = [name.strip() for name in harness.split(",") if name.strip()]
            found = judge(run, tasks, include_path, base, batch_size)
        else:
            from msplora.train.evaluation import evaluate_run

            found = evaluate_run(run, data, base, batch_size)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    rows = {LEFT_OUT.get(name, name): its for name, its in found.items()}
    for task, metrics in rows.pop("tasks", {}).items():
        rows |= {f"{task}: {name}": its for name, its in metrics.items()}
    rows.pop("run")
    _print_table(str(run), rows)


def _print_table(title: str, rows: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("metric", "value", title=escape(title))
    table.columns[1].justify = "right"
    for name, value in rows.items():
        table.add_row(escape(name), f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
