"""The commands that use a finished run: evaluate, predict or generate, convert, serve."""

from __future__ import annotations

import shlex
from pathlib import Path

from .settings import Settings

# The values that vLLM accepts for --max-lora-rank.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def next_steps(settings: Settings, run: Path, rank: int | None) -> list[tuple[str, str]]:
    """Return (what for, command) for a run; `rank` is that of each layer's adapter."""
    folder = shlex.quote(_short(run))
    classifies = settings.task == "classification"
    steps = [("evaluate", f"msplora eval {folder}")]
    if classifies:
        steps.append(("predict", f"msplora predict {folder} FILE.tsv"))
    else:
        steps.append(("generate", f'msplora generate {folder} --prompt "..."'))
    if rank is None:
        return steps
    adapter = shlex.quote(_short(run / "adapter"))
    lora = adapter
    if settings.method == "msplora":
        lora = shlex.quote(_short(run.with_name(run.name + "-lora")))
        steps.append(("convert", f"msplora convert {adapter} --to lora {lora}"))
    merged = shlex.quote(_short(run.with_name(run.name + "-merged")))
    steps.append(("merge", f"msplora convert {adapter} --to merged {merged}"))
    if not classifies:
        steps.append(("serve", serve_command(settings.model, lora, rank, run.name)))
    return steps


def serve_command(model: str, adapter: str, rank: int, name: str) -> str:
    """Return vLLM's command for a LoRA of `rank`; merged weights are what is left beyond 512."""
    fitting = [allowed for allowed in _VLLM_RANKS if allowed >= rank]
    if not fitting:
        return f"(rank {rank} is beyond vLLM's {_VLLM_RANKS[-1]}: serve the merged model)"
    return (
        f"vllm serve {shlex.quote(model)} --enable-lora --max-lora-rank {fitting[0]} "
        f"--lora-modules {shlex.quote(name)}={adapter}"
    )


def _short(path: Path) -> str:
    """Relative to here where that is below here: it is what one would type."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
