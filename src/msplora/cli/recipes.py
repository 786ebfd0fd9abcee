"""`msplora recipes`: complete configs to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

recipes_app = typer.Typer(
    help="List complete configs to start from, show one, or copy it.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
Name = Annotated[str, typer.Argument(help="Of the recipe, as the list has it.")]


@recipes_app.callback(invoke_without_command=True)
def list_recipes(context: typer.Context) -> None:
    """List complete configs to start from; `copy` gives you your own, `show` prints one."""
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console
    from rich.table import Table

    from msplora.recipes import recipes

    table = Table(show_lines=True)
    table.add_column("recipe", no_wrap=True)  # to be copied whole, from the narrowest terminal
    table.add_column("what it is, and what to expect")
    for recipe in recipes():
        facts = [f"{name}: {recipe.facts[name]}" for name in ("Expected", "Time", "Memory")]
        table.add_row(recipe.name, "\n".join([recipe.title, *facts]))
    console = Console()
    console.print(table)
    console.print("msplora recipes copy NAME gives you the file; msplora train FILE runs it.")


@recipes_app.command("show")
def show(name: Name) -> None:
    """Print a recipe."""
    from msplora.recipes import find

    typer.echo(find(name).text, nl=False)


@recipes_app.command("copy")
def copy(
    name: Name,
    to: Annotated[
        Path | None, typer.Argument(help="File or folder to write it to; this folder if left out.")
    ] = None,
) -> None:
    """Write a recipe to a file of your own; nothing is overwritten."""
    from msplora.recipes import copy as copy_recipe

    file = copy_recipe(name, to)
    typer.echo(f"{file} is yours. Change what is not right, then: msplora train {file}")
