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
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are answered together.")] = 32,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest completion of a language model.")
    ] = 128,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines instead of a table.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
) -> None:
    """Predict a class and its probability, a number, or a completion for each row."""
    from functools import partial

    from msplora.extras import train_extra

    from .progress_bar import progress_bar

    tell = partial(typer.echo, err=True)
    with train_extra():
        from msplora.train.prediction import predict_file
        from msplora.train.predictions_file import as_texts, check_output, write_predictions

        if not output:  # what is printed shows how far it is
            found = predict_file(run, file, base, batch_size, max_new_tokens, notify=tell)
            for text in as_texts(found, ".jsonl" if as_json else ".tsv"):
                typer.echo(text)
            return
        check_output(output, force, file)
        with progress_bar() as progress:
            found = predict_file(run, file, base, batch_size, max_new_tokens, progress, tell)
            count = write_predictions(found, output)
    typer.echo(f"{count} predictions are in {output}")
