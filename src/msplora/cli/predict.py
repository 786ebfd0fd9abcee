"""`msplora predict`: what a saved model says to each row of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def predict(
    run: Annotated[Path, typer.Argument(help="Run folder, or adapter folder.")],
    file: Annotated[
        Path,
        typer.Argument(help="Rows without labels, as a table, or a folder of images."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="File to write, .jsonl or .tsv; printed if left out.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model, where the recorded one has moved.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 32,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest completion of a language model.")
    ] = 128,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines instead of a table.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
) -> None:
    """Predict a class and its probability, a number, or a completion for each row."""
    from msplora.extras import train_extra

    with train_extra():
        from msplora.train.prediction import (
            check_output,
            format_predictions,
            predict_file,
            write_predictions,
        )

        if output:
            check_output(output, force, file)
        found = predict_file(run, file, base, batch_size, max_new_tokens)
    if not output:
        typer.echo(format_predictions(found, ".jsonl" if as_json else ".tsv"), nl=False)
        return
    write_predictions(found, output)
    typer.echo(f"{len(found)} predictions are in {output}")
