"""`msplora sweep`: many runs that differ in some keys, one table and one plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .progress_console import progress_console


def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file of the sweep; see docs/training.md.")],
    output: Annotated[Path | None, typer.Option(help="The sweep's folder.")] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Show what is there and what would run; run nothing.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run those again that failed.")
    ] = False,
    allow_many: Annotated[
        bool, typer.Option("--allow-many", help="Run more than a thousand.")
    ] = False,
) -> None:
    """Train with every combination of a grid, or search with optuna; continues what was stopped.

    The exit code is 1 where a run failed, was ended by somebody else, or none is complete, else 0.
    """
    from msplora.extras import sweep_extra, train_extra

    with train_extra(), sweep_extra():
        from msplora.sweep.reading import read_sweep

        asked = read_sweep(file, str(output) if output else None)
        if asked.settings.search:
            import optuna  # noqa: F401  (missed now, not after the first runs)
        from rich.console import Console

        from msplora.sweep.sweep import results_in, run_sweep
        from msplora.sweep.table import rich_table

        if list_:
            settings, folder = results_in(asked)
        else:
            settings = run_sweep(
                asked, progress_console(), retry_failed=retry_failed, allow_many=allow_many
            )
            folder = asked.output
    console = Console()
    console.print(rich_table(asked, settings))
    if list_:
        begun = sum(row is not None for its in settings for row in its.rows.values())
        console.print(f"{asked.count} runs, of which {begun} were begun.", highlight=False)
        return
    said = f"The table and the plot are in {folder}"
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    rows = [row for its in settings for row in its.rows.values() if row]
    failed = [row for row in rows if row.status == "failed"]
    if failed:
        said = f"{len(failed)} of {len(rows)} failed; --retry-failed runs them again."
        console.print(f"{said} The first for: {failed[0].error}", markup=False, soft_wrap=True)
    ended = sum(row.status == "unfinished" for row in rows)
    if ended:
        said = f"{ended} of {len(rows)} were ended from outside; the same command goes on."
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    is_any_complete = any(row.status == "complete" for row in rows)
    if not failed and not ended and not is_any_complete:
        console.print("No run is complete.")
    if failed or ended or not is_any_complete:
        raise typer.Exit(1)
