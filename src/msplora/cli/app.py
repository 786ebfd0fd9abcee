"""The table of verbs. Nothing here, or at the top of a verb's file, may import torch or PEFT."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from msplora import __version__
from msplora.errors import MSPLoraError

from . import (
    analyse,
    bake_off,
    bench,
    convert,
    data,
    demo,
    doctor,
    evaluate,
    generate,
    inspect,
    plan,
    predict,
    recipes,
    sweep,
    train,
)

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Set where a launcher waits for word of an error; the file it is left in."""

app = typer.Typer(
    name="msplora",
    help="Fine-tune transformers with pyramids of shared low-rank adapters (MSPLoRA).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"msplora {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Results, warnings and errors only.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="What the libraries underneath say too.")
    ] = False,
) -> None:
    """Options of every verb."""
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    logging.getLogger("msplora").setLevel(level)
    if not verbose:
        # PEFT imports it where it is installed, and it tells of kernels that some CPUs lack.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


app.command("train", cls=train.TrainCommand)(train.train)
app.command("sweep")(sweep.sweep)
app.command("bake-off")(bake_off.bake_off)
app.command("data")(data.data)
app.command("eval")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("generate")(generate.generate)
app.command("plan")(plan.plan)
app.command("convert")(convert.convert)
app.command("inspect")(inspect.inspect)
app.command("doctor")(doctor.doctor)
app.command("analyse")(analyse.analyse)
app.command("demo")(demo.demo)
app.add_typer(recipes.recipes_app, name="recipes")
app.add_typer(bench.bench_app, name="bench")


def main() -> None:
    """Run the command; an error made by the user is printed without a traceback, exit code 1.

    A run that was stopped by a signal exits with 128 plus its number, as programs do.
    """
    try:
        app()
    except MSPLoraError as error:
        if ERROR_FILE in os.environ and os.environ.get("RANK", "0") != "0":
            # Of several processes the first prints; where another fails alone, the launcher does.
            from msplora.train.devices import report_failure

            report_failure(error)
            sys.exit(error.exit_code)
        from rich.console import Console
        from rich.markup import escape

        # Of what was stopped, the message says so itself.
        title = "[bold red]Error:[/] " if error.exit_code < 128 else ""
        Console(stderr=True, soft_wrap=True).print(f"{title}{escape(str(error))}")
        sys.exit(error.exit_code)
