"""What the keys of a run's settings do not allow together."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from msplora.errors import ConfigError, nearest

from .peft_methods import METHODS_IN_BITS, check_method
from .settings import TASKS_OF_KEY, Settings
from .settings_data import DataSettings
from .settings_methods import LORAS

# A GLUE task has files, columns and classes of its own.
_DECIDED_BY_GLUE = ("text_columns", "label_column", "labels", "regression", "validation")

# Key of `data` -> the source of rows that alone reads it.
_OF_ONE_SOURCE = {
    "path": "glue",
    "hub_config": "hub",
    "hub_revision": "hub",
    "train_split": "hub",
    "validation_split": "hub",
}

_POLYNOMIAL_END = 1e-7  # the last learning rate of transformers' schedule


def check_together(settings: Settings, source: str) -> None:
    """Refuse combinations that each key alone allows; `source` names the file in errors."""
    data = settings.data

    def default(key: str) -> Any:
        return DataSettings.model_fields[key].get_default(call_default_factory=True)

    if not settings.classifies and settings.method == "frozen":
        raise ConfigError(
            f"in {source}: method 'frozen' trains a classifier's head only, and task "
            f"{settings.task!r} has none. Use method msplora, lora or full."
        )
    check_method(settings, source)
    if settings.quantization and settings.method not in METHODS_IN_BITS:
        raise ConfigError(
            f"in {source}: msplora trains on a base in {settings.quantization} with method "
            f"{', '.join(METHODS_IN_BITS)}, and the method is {settings.method!r}. Use one of "
            f"those, or leave quantization out."
        )
    if settings.task == "dpo" and settings.adapter.bias != "none":
        raise ConfigError(
            f"in {source}: adapter.bias = {settings.adapter.bias!r} trains biases of the base, and "
            f"task 'dpo' compares with the base as it was. Leave it out."
        )
    unset = Settings(model="", task=settings.task, output="")  # pyright: ignore[reportCallIssue]
    for key, tasks in TASKS_OF_KEY.items():
        value = operator.attrgetter(key)(settings)
        if settings.task not in tasks and value != operator.attrgetter(key)(unset):
            raise ConfigError(
                f"in {source}: {key} = {value!r} is for task {' or '.join(map(repr, tasks))}, and "
                f"the task is {settings.task!r}. Leave it out, or change the task."
            )
    sources = [key for key in ("glue", "train", "hub") if getattr(data, key) is not None]
    if len(sources) != 1:
        found = " and ".join(f"data.{key}" for key in sources) or "none of them"
        raise ConfigError(
            f"in {source}: say where the data is with one of data.glue (with data.path), "
            f"data.train or data.hub; found {found}."
        )
    if data.glue and settings.task != "classification":
        raise ConfigError(
            f"in {source}: data.glue is for task 'classification', not {settings.task!r}."
        )
    if data.glue and not data.path:
        raise ConfigError(
            f"in {source}: data.glue = {data.glue!r} needs data.path, the folder with train.tsv "
            f"and dev.tsv."
        )
    decided = [f"data.{key}" for key in _DECIDED_BY_GLUE if getattr(data, key) != default(key)]
    if data.glue and decided:
        raise ConfigError(
            f"in {source}: data.glue = {data.glue!r} decides {', '.join(decided)} by itself. Leave "
            f"it out, or name the files in data.train and data.validation instead of data.glue."
        )
    for key, alone in _OF_ONE_SOURCE.items():
        if getattr(data, key) != default(key) and getattr(data, alone) is None:
            instead = " Name a held-out file in data.validation." if key.startswith("valid") else ""
            raise ConfigError(
                f"in {source}: data.{key} = {getattr(data, key)!r} is read with data.{alone}, and "
                f"the rows are from data.{sources[0]}. Leave it out.{instead}"
            )
    for key, listed in (("data.train", data.train), ("data.validation", data.validation)):
        for number, its in enumerate(listed if isinstance(listed, list) else [], 1):
            if its.columns and settings.task not in TASKS_OF_KEY["data.columns"]:
                raise ConfigError(
                    f"in {source}: {key}, entry {number}: columns are for task 'sft' or 'dpo', and "
                    f"the task is {settings.task!r}. Name its columns in data.text_columns and "
                    f"data.label_column; those hold for every source."
                )
    held_out = data.validation if isinstance(data.validation, list) else []
    weighted = [number for number, its in enumerate(held_out, 1) if its.weight != 1]
    if weighted:
        raise ConfigError(
            f"in {source}: data.validation, entry {weighted[0]}: held-out rows are judged once "
            f"each. Leave its weight out."
        )
    if settings.training.packing and settings.training.group_by_length:
        raise ConfigError(
            f"in {source}: training.group_by_length puts rows of like length into a batch, and "
            f"training.packing leaves no rows to group. Leave one out."
        )
    if data.regression and data.labels:
        raise ConfigError(f"in {source}: data.labels names classes, but data.regression is set.")
    if settings.classifies and not has_validation(settings):
        raise ConfigError(
            f"in {source}: a classifier keeps its best epoch, so it needs held-out rows: set "
            f"data.validation, data.validation_split or data.validation_fraction above 0."
        )
    _check_training(settings, source)
    if settings.devices.device_map and settings.devices.processes > 1:
        raise ConfigError(
            f"in {source}: devices.device_map spreads one process's model over all devices, and "
            f"devices.processes = {settings.devices.processes} gives each process one. Choose one."
        )
    _check_frozen_is_saved(settings, source)
    if settings.init_from and settings.method not in ("msplora", *LORAS):
        raise ConfigError(
            f"in {source}: init_from starts from an adapter of MSPLoRA or LoRA, and the method is "
            f"{settings.method!r}. Use method msplora or lora."
        )


def _check_frozen_is_saved(settings: Settings, source: str) -> None:
    strategy, training = settings.devices.strategy, settings.training
    key = "stages" if training.stages else "frozen_levels" if training.frozen_levels else None
    if key and settings.method == "msplora" and strategy.startswith("zero"):
        raise ConfigError(
            f"in {source}: training.{key} freezes levels, and devices.strategy = {strategy!r} is "
            f"DeepSpeed's, which leaves what does not train out of its checkpoints: the run could "
            f"not go on from one, nor save the adapter whole. Use strategy fsdp2 or ddp."
        )


def _check_training(settings: Settings, source: str) -> None:
    training = settings.training
    frozen = training.frozen_levels or ()
    both = [its for stage in training.stages or () for its in stage.levels if its in frozen]
    if both:
        raise ConfigError(
            f"in {source}: training.frozen_levels and training.stages both name {both[0]}. A level "
            f"that trains in a stage is not frozen: take it out of one of them."
        )
    if training.early_stopping_patience and not has_validation(settings):
        raise ConfigError(
            f"in {source}: training.early_stopping_patience needs held-out rows to judge by: set "
            f"data.validation, data.validation_split or data.validation_fraction above 0."
        )
    if training.head_learning_rate is not None and training.head_learning_rate_factor != 1:
        raise ConfigError(
            f"in {source}: training.head_learning_rate = {training.head_learning_rate:g} is the "
            f"head's rate itself, and training.head_learning_rate_factor = "
            f"{training.head_learning_rate_factor:g} makes one of the adapter's. Leave one out."
        )

    usual = type(training).model_fields["warmup_ratio"].default
    if training.scheduler == "constant" and training.warmup_ratio not in (0, usual):
        raise ConfigError(
            f"in {source}: training.scheduler 'constant' has no warm-up, and training.warmup_ratio "
            f"is {training.warmup_ratio:g}. Use constant_with_warmup, or a ratio of 0."
        )
    if training.scheduler == "polynomial" and training.learning_rate <= _POLYNOMIAL_END:
        raise ConfigError(
            f"in {source}: training.scheduler 'polynomial' falls to {_POLYNOMIAL_END:g}, and "
            f"training.learning_rate is {training.learning_rate:g}. Use linear."
        )


def has_validation(settings: Settings) -> bool:
    """Whether a run holds rows out to be judged by."""
    data = settings.data
    return bool(data.glue or data.validation or data.validation_split or data.validation_fraction)


def check_metric(settings: Settings, usual: str, known: Iterable[str]) -> str:
    """Return the metric that picks the checkpoint to keep; refuse one the task does not have."""
    wanted = settings.training.metric_for_best or usual
    known = list(known)
    if wanted not in known:
        raise ConfigError(
            f"training.metric_for_best = {wanted!r}; this task has {', '.join(known)}."
            + nearest(wanted, known, count=1)
        )
    return wanted
