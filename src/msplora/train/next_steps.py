"""The commands that use a finished run: evaluate, predict or generate, convert, serve."""

from __future__ import annotations

import shlex
from pathlib import Path

from msplora.serving import serve_command

from .peft_methods import METHODS
from .settings import Settings


def next_steps(settings: Settings, run: Path, rank: int | None) -> list[tuple[str, str]]:
    """Return (what for, command) for a run; `rank` is that of each layer's adapter."""
    folder = shlex.quote(_short(run))
    steps = [("evaluate", f"msplora eval {folder}")]
    if settings.classifies:
        given = "FILE.tsv" if settings.task == "classification" else "FOLDER"
        steps.append(("predict", f"msplora predict {folder} {given}"))
    else:
        steps.append(("generate", f'msplora generate {folder} --prompt "..."'))
    if rank is None:
        return steps
    adapter = shlex.quote(_short(run / "adapter"))
    lora = _short(run / "adapter")
    if settings.method == "msplora":
        lora = _short(run.with_name(run.name + "-lora"))
        steps.append(("convert", f"msplora convert {adapter} --to lora {shlex.quote(lora)}"))
    if settings.method in METHODS and not METHODS[settings.method].merges:
        return steps
    merged = shlex.quote(_short(run.with_name(run.name + "-merged")))
    steps.append(("merge", f"msplora convert {adapter} --to merged {merged}"))
    if not settings.classifies and settings.method not in METHODS:
        steps.append(("serve", serve_command(settings.model, lora, rank, run.name)))
    return steps


def _short(path: Path) -> str:
    """Relative to here where that is below here: it is what one would type."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
