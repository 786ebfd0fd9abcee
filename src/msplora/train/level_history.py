"""What the levels were like at each checkpoint: small figures, kept when the checkpoints go."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from msplora.analysis.history import RECORD, checkpoint, read_record
from msplora.errors import MSPLoraError
from msplora.loading import CONFIG_FILE, BaseOptions

from .checkpoints import checkpoint_folder, write_whole
from .settings import Settings


class LevelHistory(TrainerCallback):
    """Adds to `checkpoints/levels.json` what `msplora analyse` follows over training.

    The figures are those of the checkpoint's file, so that nothing is asked of other processes.
    """

    def __init__(self, checkpoints: Path, settings: Settings, tell: Callable[[str], None]) -> None:
        self._checkpoints, self._tell = checkpoints, tell
        self._base = BaseOptions(
            settings.model, "auto", settings.revision, settings.trust_remote_code
        )
        self._on = settings.method in ("lora", "msplora") and not settings.adapter.use_dora

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make up for a process that was killed between its checkpoint and this record of it."""
        self._note(state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the checkpoint that was just written."""
        self._note(state)

    def _note(self, state: Any) -> None:
        folder = checkpoint_folder(self._checkpoints, state.global_step)
        # Shards of a model have no adapter's file.
        whole = (folder / CONFIG_FILE).is_file()
        if not (self._on and whole and state.is_world_process_zero):
            return
        record = {its.step: its for its in read_record(self._checkpoints)}
        if state.global_step in record:
            return
        try:
            record[state.global_step] = checkpoint(folder, self._base)
        except MSPLoraError as error:
            self._on = False
            self._tell(f"the levels are not followed over training: {error}")
            return
        content = [asdict(record[step]) for step in sorted(record)]
        write_whole(self._checkpoints / RECORD, json.dumps(content, indent=1) + "\n")
