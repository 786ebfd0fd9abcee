"""Open what a run left: a run folder, or the folder of its adapter or model alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

from msplora.errors import MSPLoraError, stopped_run
from msplora.loading import TASK_FILE, BaseOptions, read_config
from msplora.same_source import same_source

from .base_model import Base, load_base
from .init_from import holds_tokenizer
from .quantisation import is_quantised
from .saved_adapter import load_adapter
from .settings import Settings
from .settings_file import make_settings
from .task_record import TaskRecord


class SavedRunError(MSPLoraError):
    """The folder holds nothing that can be opened, or not what the verb needs."""


@dataclass
class SavedRun:
    """A trained model, ready to be used, and what is known of its task."""

    path: Path
    base: Base
    model: Any
    record: TaskRecord

    @property
    def settings(self) -> Settings:
        """The settings of the run that made it."""
        return self.record.settings


def open_run(
    path: Path | str,
    base: str | BaseOptions | None = None,
    put_on: Callable[[Any, Path], Any] = load_adapter,
) -> SavedRun:
    """Load the model of a run folder, of an adapter folder or of a saved model's folder.

    `base` is the base to put the adapter on, where the recorded one has moved, or how to load it;
    `put_on` does so.
    """
    path = Path(path).expanduser()
    options = BaseOptions.of(base)
    weights = _weights(path)
    record = TaskRecord.load(weights) or _record_of_foreign_adapter(weights, options.source)
    settings = record.settings.model_copy(deep=True)
    adapted = (weights / "adapter_config.json").is_file()
    if options.source and not adapted:
        raise SavedRunError(
            f"{weights} holds a whole model (method {settings.method}), not an adapter; leave "
            f"--base out."
        )
    if not adapted:
        settings.model = str(weights)
    else:
        if options.source:
            if not same_source(settings.model, options.source):
                settings.revision = None  # the recorded one is of the recorded base
            settings.model = options.source
        settings.revision = options.revision or settings.revision
        settings.trust_remote_code |= options.trust_remote_code
    # The tokenizer was saved with the weights, and with it what the run set on it.
    settings.tokenizer = str(weights) if holds_tokenizer(weights) else None
    settings.data.chat_template = settings.init_from = None
    settings.dtype = _dtype(record)
    loaded = load_base(settings, record.classes, for_training=settings.method == "full")
    model = loaded.model
    if adapted:
        with warnings.catch_warnings():
            if options.source:  # that it is not the recorded path is what was asked for
                warnings.filterwarnings("ignore", message="the adapter names")
            model = put_on(model, weights)
    # One that is quantised, or spread over devices, is where it shall be, and may not be moved.
    if not is_quantised(loaded.model) and not settings.devices.device_map:
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    return SavedRun(path, loaded, model.eval(), record)


def _dtype(record: TaskRecord) -> Any:
    """What to compute in: what the run did, but for float16 without a GPU."""
    # The weights say it no more where all of them were trained, which is in float32.
    dtype = record.dtype or record.settings.dtype
    return "float32" if dtype == "float16" and not torch.cuda.is_available() else dtype


def _weights(path: Path) -> Path:
    if not path.is_dir():
        raise SavedRunError(
            f"{path} is not a folder; give a run folder or an adapter folder.{stopped_run(path)}"
        )
    for folder in (path, path / "adapter", path / "model"):
        if (folder / "adapter_config.json").is_file() or (folder / TASK_FILE).is_file():
            return folder
    raise SavedRunError(
        f"{path} is neither a run folder nor an adapter: it holds no adapter_config.json and no "
        f"task.json.{stopped_run(path)}"
    )


def _record_of_foreign_adapter(weights: Path, base_override: str | None) -> TaskRecord:
    """What can be known of an adapter that another program made: causal language models only."""
    if not (weights / "adapter_config.json").is_file():
        raise SavedRunError(f"{weights} holds no task.json, and is not an adapter.")
    config: Any = read_config(weights)
    base = base_override or config.base_model_name_or_path
    if not base:
        raise SavedRunError(f"{weights} does not name its base model; give it with --base.")
    if config.task_type not in (peft.TaskType.CAUSAL_LM, None):
        raise SavedRunError(
            f"{weights} is a {config.task_type} adapter without task.json, so its classes are not "
            f"known. Train it with msplora train, or use it through PEFT."
        )
    content = {
        "model": base,
        "task": "sft",
        "output": str(weights),
        "method": "lora",
        "revision": config.revision,
        # No data of its own: --data names the file.
        "data": {"train": str(weights / "no-data.jsonl")},
    }
    return TaskRecord(make_settings(content, str(weights / "adapter_config.json")))
