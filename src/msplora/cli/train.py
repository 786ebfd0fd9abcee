"""`msplora train`: fine-tune a model as a config file says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .progress_console import progress_console


def train(
    config: Annotated[Path, typer.Argument(help="YAML file; docs/training.md lists its keys.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, as in training.epochs=5."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run folder to make.")] = None,
    method: Annotated[
        str | None, typer.Option(help="msplora, lora, full or frozen: the same run otherwise.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an unfinished run from its last checkpoint.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a run, or discard an unfinished one.")
    ] = False,
) -> None:
    """Fine-tune a model; leaves a complete run folder with the adapter, its numbers and a card."""
    from msplora.extras import train_extra

    with train_extra():
        from msplora.train.settings_file import read_settings

        flags = {"output": str(output) if output else None, "method": method, "seed": seed}
        settings = read_settings(config, set_ or (), flags)
        # Only now: a mistake in the config should not wait for torch to be imported.
        from msplora.train.run import train_run

        train_run(settings, resume=resume, force=force, console=progress_console())
