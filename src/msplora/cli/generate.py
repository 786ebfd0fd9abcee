"""`msplora generate`: let a saved language model continue a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def generate(
    run: Annotated[Path, typer.Argument(help="Run folder, or adapter folder.")],
    prompt: Annotated[str, typer.Option(help="What to continue or answer.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Sample among this share of probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    base: Annotated[
        str | None, typer.Option(help="Base model, where the recorded one has moved.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Give the prompt as it is, outside any template.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print prompt and answer as JSON.")
    ] = False,
) -> None:
    """Continue a prompt, put in the form that the model was trained on (alpaca, chat, text)."""
    from msplora.extras import train_extra

    with train_extra():
        from msplora.train.generation import generate_text

        answer = generate_text(
            run, prompt, base, max_new_tokens, temperature, top_p, seed=seed, raw=raw
        )
    typer.echo(
        json.dumps({"prompt": prompt, "completion": answer}, ensure_ascii=False, indent=2)
        if as_json
        else answer
    )
