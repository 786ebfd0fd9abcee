"""`msplora analyse`: what the levels of adapters learned, as a table, JSON and a page."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer


def analyse(
    adapters: Annotated[
        list[Path], typer.Argument(help="Folders of adapters (MSPLoRA or LoRA), or of runs.")
    ],
    base: Annotated[
        str | None,
        typer.Option(help="The base model: norms relative to its weights, intruder dimensions."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Labelled rows: the loss with each level switched off; loads the model."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="A page to write (*.html), or a folder for the page and the numbers."),
    ] = None,
    intruders: Annotated[
        int | None,
        typer.Option(
            min=0, help="Singular vectors of each weight to compare with the base's: 10 by default."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    revision: Annotated[str | None, typer.Option(help="Of the base model on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run Python code that the base model brings along.")
    ] = False,
    force: Annotated[bool, typer.Option(help="Replace the files that are there.")] = False,
) -> None:
    """Measure what the levels of an adapter learned; two or more are laid side by side."""
    if base is None and intruders is not None:
        raise typer.BadParameter("--intruders compares with the base's weights: give --base.")
    if base is None and data is None and (revision is not None or trust_remote_code):
        raise typer.BadParameter(
            "--revision and --trust-remote-code are for the base, which is read for --base and "
            "--data only."
        )
    from msplora.analysis.analysing import analyse as measure
    from msplora.analysis.output import check_free
    from msplora.extras import report_extra
    from msplora.loading import BaseOptions

    from .analyse_table import print_analysis
    from .progress_bar import progress_bar

    if output is not None:
        with report_extra():
            import jinja2  # noqa: F401  (missed now, not after the work)
        check_free(output, force)
    options = BaseOptions(base, "auto", revision, trust_remote_code)
    with progress_bar() as progress:
        found = measure(
            *adapters,
            base=options,
            intruder_vectors=10 if intruders is None else intruders,
            data=data,
            progress=progress,
            notify=_tell,
        )
    written = [] if output is None else found.write(output, force=force)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), allow_nan=False))
        return
    from rich.console import Console

    console = Console()
    print_analysis(found, console)
    for file in written:
        console.print(f"Wrote {file}", markup=False, highlight=False, soft_wrap=True)


def _tell(sentence: str) -> None:
    """On stderr, and not under `msplora -q`."""
    if logging.getLogger("msplora").isEnabledFor(logging.INFO):
        typer.echo(sentence, err=True)
