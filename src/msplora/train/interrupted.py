"""What an interrupted run has left, for those who start many: does it go on, or begin anew?"""

from __future__ import annotations

from pathlib import Path

from .settings import Settings

NOT_RESUMED = ("adalora",)
"""The methods whose unfinished runs can only be started anew."""


def has_to_start_anew(settings: Settings) -> bool:
    """Whether what an interrupted run has left cannot be continued, whoever asks."""
    output = Path(settings.output)
    checkpoints = output.with_name(f"{output.name}.unfinished") / "checkpoints"
    return settings.method in NOT_RESUMED and any(checkpoints.glob("checkpoint-*"))


def goes_on(settings: Settings) -> bool:
    """Whether an interrupted run with these settings goes on after a checkpoint."""
    output = Path(settings.output)
    checkpoints = output.with_name(f"{output.name}.unfinished") / "checkpoints"
    return any(checkpoints.glob("checkpoint-*")) and not has_to_start_anew(settings)
