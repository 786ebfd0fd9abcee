"""`msplora inspect`: what a folder holds, and what is suspicious about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    path: Annotated[
        Path, typer.Argument(help="The folder of an adapter (MSPLoRA or LoRA), a run or a model.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what a folder holds: levels, ranks, who shares, norms, and anything suspicious.

    Loads no model and asks no network. Exits with 1 where a problem is found, or nothing can be
    read; warnings leave it at 0.
    """
    from msplora.inspection.inspecting import inspect as look

    from .inspect_table import print_inspection
    from .progress_bar import progress_bar

    with progress_bar() as progress:
        found = look(path, progress=progress)
    if as_json:
        typer.echo(found.to_json(), nl=False)
    else:
        print_inspection(found)
    if found.problems:
        raise typer.Exit(1)
