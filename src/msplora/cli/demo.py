"""`msplora demo`: the main job in small, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .progress_console import progress_console


def demo(
    output: Annotated[
        Path, typer.Option(help="Folder to write; an earlier demo's is replaced.")
    ] = Path("runs/demo"),
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Stop each run early, for a quick try.")
    ] = None,
) -> None:
    """Teach a small pretrained model what it cannot do, with a pyramid and with plain LoRA."""
    from msplora.extras import train_extra

    with train_extra():
        from msplora.demo.run import run_demo

        run_demo(output, max_steps, progress_console())
