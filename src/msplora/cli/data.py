"""`msplora data`: what a config's rows are like, before a weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def data(
    config: Annotated[Path, typer.Argument(help="YAML file of a run, as for msplora train.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, as for msplora train."),
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Training rows to print.")] = 3,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the check as a run's data.json has it.")
    ] = False,
) -> None:
    """Check the rows of a run: lengths, loss mask, end tokens, duplicates, balance of classes."""
    from msplora.extras import train_extra

    with train_extra():
        from msplora.train.settings_file import read_settings

        settings = read_settings(config, set_ or ())
        from rich.console import Console

        from msplora.train.data_report import data_report, show_report

        report = data_report(settings, rows)
    if as_json:
        typer.echo(json.dumps(report.check.to_dict(), indent=2, ensure_ascii=False))
        return
    show_report(report, settings, Console())
