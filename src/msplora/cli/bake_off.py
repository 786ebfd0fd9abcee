"""`msplora bake-off`: methods on the same tasks, each at its own best learning rate."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from .progress_console import progress_console


def bake_off(
    file: Annotated[Path, typer.Argument(help="YAML file of the bake-off; see docs/bake-off.md.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, as in base.model=gpt2."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The bake-off's folder.")] = None,
    list_: Annotated[
        bool,
        typer.Option("--list", help="Show what there is; run and write nothing."),
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the report of what is there; run nothing.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run those again that failed.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Make runs at once on a Ray cluster: its address, auto, or local for one here.",
        ),
    ] = None,
    cpus: Annotated[
        float | None, typer.Option(min=0.01, help="With --ray: cores of a run; 1 if left out.")
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(min=0, help="With --ray: GPUs of a run; none leaves it the CPU.")
    ] = None,
) -> None:
    """Compare methods, each at its own best learning rate; continues what was stopped.

    The exit code is 1 where a run failed, was ended by somebody else, or none is complete, else 0.
    """
    if ray is None and (cpus is not None or gpus is not None):
        raise typer.BadParameter("--cpus, --gpus: for --ray only. Without it a run has it all.")
    from msplora.extras import report_extra, train_extra

    with train_extra(), report_extra():
        import jinja2  # noqa: F401  (missed now, not after the last run)
        from rich.console import Console

        from msplora.bakeoff.bake_off import outcome_so_far, run_bake_off
        from msplora.bakeoff.engines import OnRay
        from msplora.bakeoff.reading import read_bake_off
        from msplora.bakeoff.report import state, write_report
        from msplora.bakeoff.sizes import prepare
        from msplora.bakeoff.terminal import rich_tables
        from msplora.errors import MSPLoraError
        from msplora.train.stopping import Interrupted

        asked = read_bake_off(file, set_ or (), str(output) if output else None)
        console = progress_console()
        with console.status("looking at what is asked for") as status:
            prepared = prepare(asked, status.update)
        if list_ or report_only:
            outcome = outcome_so_far(prepared)
        else:
            engine = OnRay(ray, 1 if cpus is None else cpus, gpus or 0) if ray else None
            try:
                outcome = run_bake_off(prepared, console, engine, retry_failed=retry_failed)
            except Interrupted:
                with suppress(MSPLoraError):  # as where nothing was run yet
                    write_report(outcome_so_far(prepared))
                raise
        results = Console()
        for table in rich_tables(outcome):
            results.print(table)
        if not list_:
            page = write_report(outcome)
            said = f"The report is {page}"
            results.print(said, markup=False, highlight=False, soft_wrap=True)
        if said := state(outcome):
            results.print(said, markup=False, highlight=False, soft_wrap=True)
            if not list_ and not report_only:
                raise typer.Exit(1)
