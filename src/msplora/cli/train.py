"""`msplora train`: fine-tune a model as a config file says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from .progress_console import progress_console

if TYPE_CHECKING:
    from msplora.train.settings import Settings

DOES_NOT_FIT = 3
"""The exit code of a dry run of what is too big; 1 is an error, 2 a mistake in the command line."""


class TrainCommand(TyperCommand):
    """Lets `--resume` stand alone or before `auto`: typer has no options with an optional value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give the option the value that it has when it stands alone: an empty one."""
        spelt, follows = [], None
        for word in args:
            if spelt[-1:] == ["--resume="]:
                if word == "auto":
                    spelt[-1] += word
                    continue
                follows = word
            spelt.append("--resume=" if word == "--resume" else word)
        # `--resume` may stand before the config; only a word too many shows that it was its value.
        ctx.allow_extra_args = follows is not None
        left = super().parse_args(ctx, spelt)
        if left:
            raise _not_a_resume(follows, ctx)
        return left


def _not_a_resume(value: str | None, ctx: Any = None) -> typer.BadParameter:
    return typer.BadParameter(
        f"it stands alone or takes auto, not {value!r}. The run is the one of the config's output, "
        f"or of --output; init_from starts from the adapter of another.",
        ctx,
        param_hint="'--resume'",
    )


def _known_resume(value: str | None) -> str | None:
    if value not in (None, "", "auto"):
        raise _not_a_resume(value)
    return value


def train(
    config: Annotated[Path, typer.Argument(help="YAML file; docs/training.md lists its keys.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, as in training.epochs=5."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run folder to make.")] = None,
    method: Annotated[
        str | None, typer.Option(help="msplora, lora, hydra, full …: the same run otherwise.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[auto]",
            callback=_known_resume,
            help="Continue an unfinished run from its last checkpoint. With auto, start one where "
            "there is none, and do nothing where it is complete.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a run, or discard an unfinished one.")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(help="Processes that train together, by accelerate: one for each GPU."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would train and take, and stop.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="Of a dry run: cpu, cuda:0, a GPU's size (24GB) or name (H100)."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Of a dry run: take two real steps and compare.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Of a dry run: print JSON.")] = False,
) -> None:
    """Fine-tune a model; leaves a complete run folder with the adapter, its numbers and a card."""
    from msplora.extras import train_extra

    if not dry_run and (device or measure or as_json):
        raise typer.BadParameter("--device, --measure and --json belong to --dry-run")
    if dry_run and (resume is not None or force):
        raise typer.BadParameter("a dry run leaves the output alone: no --resume, no --force")
    with train_extra():
        from msplora.train.settings_file import read_settings

        flags = {"output": str(output) if output else None, "method": method, "seed": seed}
        changes = [*(set_ or ())]
        if processes is not None:
            changes.append(f"devices.processes={processes}")
        settings = read_settings(config, changes, flags)
        if dry_run:
            _dry_run(settings, device, measure, as_json)
            return
        # Only now: a mistake in the config should not wait for torch to be imported.
        from msplora.train.devices import is_worker, launch

        if settings.devices.processes > 1 and not is_worker():
            raise typer.Exit(launch(settings.devices, sys.argv[1:]))
        from rich.console import Console

        from msplora.train.run import train_run

        how = "auto" if resume == "auto" else resume is not None
        train_run(settings, how, force, console=progress_console(), results=Console())


def _dry_run(settings: Settings, device: str | None, measure: bool, as_json: bool) -> None:
    from msplora.train.dry_run import dry_run
    from msplora.train.dry_run_report import show_dry_run

    found = dry_run(settings, device, measure)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        from rich.console import Console

        show_dry_run(found, Console())
    if found.fits is False:
        raise typer.Exit(DOES_NOT_FIT)
