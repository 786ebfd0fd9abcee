"""`msplora bench render`: the page of the benchmarks, from their result files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def render(
    results: Annotated[
        Path,
        typer.Argument(metavar="RESULTS_DIR", help="Folder of the result files."),
    ],
    output: Annotated[
        Path, typer.Option(help="Page to write; its plots go to the folder of the same name.")
    ] = Path("docs/benchmarks.md"),
) -> None:
    """Write results as a page with tables and plots; every number and claim is from the files."""
    from msplora.bench.render import write_page

    page, *plots = write_page(results, output)
    typer.echo(f"Wrote {page} and {len(plots)} plots in {page.with_suffix('')}.")
