"""The commands that use a finished run: evaluate, predict or generate, convert, serve."""

from __future__ import annotations

import shlex
from pathlib import Path

from msplora.server_limits import features, why_not_served
from msplora.serving import SERVERS, serve_command
from msplora.sisters.hydra.model import layers_without_bias

from .methods import Adapted
from .peft_methods import METHODS
from .quantisation import is_quantised
from .settings import Settings


def next_steps(settings: Settings, run: Path, adapted: Adapted) -> list[tuple[str, str]]:
    """Return (what for, command) for a run; `adapted` is what it trained."""
    folder = shlex.quote(_short(run))
    steps = [("evaluate", f"msplora eval {folder}")]
    if settings.classifies:
        given = "FILE.tsv" if settings.task == "classification" else "FOLDER"
        steps.append(("predict", f"msplora predict {folder} {given}"))
    else:
        steps.append(("generate", f'msplora generate {folder} --prompt "..."'))
    rank, model = adapted.rank, adapted.model
    if rank is None:
        return steps
    adapter = shlex.quote(_short(run / "adapter"))
    lora = _short(run / "adapter")
    if settings.method == "msplora":
        lora = _short(run.with_name(run.name + "-lora"))
        steps.append(("convert", f"msplora convert {adapter} --to lora {shlex.quote(lora)}"))
    if settings.method in METHODS and not METHODS[settings.method].merges:
        return steps
    if layers_without_bias(model):  # into which Hydra's own could be merged
        return steps
    merged = shlex.quote(_short(run.with_name(run.name + "-merged")))
    rounded = is_quantised(model.get_base_model()) and not settings.quantization
    steps.append(
        (
            "merge",
            f"msplora convert {adapter} --to merged {merged}" + " --allow-quantized" * rounded,
        )
    )
    if settings.classifies or settings.method in METHODS:
        return steps
    if why_not_served(features(model), SERVERS["vllm"], rank) is None:
        steps.append(("serve", serve_command(settings.model, lora, rank, run.name)))
    return steps


def _short(path: Path) -> str:
    """Relative to here where that is below here: it is what one would type."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
