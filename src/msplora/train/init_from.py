"""The adapter that a run starts from: what it is for, and whether it is still the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import transformers

from msplora.errors import AdapterFileError, ConfigError
from msplora.loading import (
    CONFIG_FILE,
    TASK_FILE,
    WEIGHTS_FILE,
    adapter_folder,
    quiet_loading,
    read_config,
)

from .checkpoints import checksum
from .data_classification import Classes
from .settings import Settings, Task
from .task_record import TaskRecord

Labelled = TypeVar("Labelled")

_KINDS: dict[Task, str] = {
    "sft": "a language model",
    "dpo": "a language model",
    "classification": "a classifier of texts",
    "image-classification": "a classifier of images",
}
_KINDS_OF_PEFT = {"CAUSAL_LM": _KINDS["sft"], "SEQ_CLS": _KINDS["classification"]}
_WEIGHTS = (CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin")
"""What an adapter consists of."""


_TOKENIZERS = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
"""What there is one of where a tokenizer, or a processor of images, was saved with the weights."""


def start_folder(settings: Settings) -> Path | None:
    """The folder of the adapter that the run starts from, if it starts from one.

    Raises:
        AdapterFileError: `init_from` names none.
    """
    return adapter_folder(Path(settings.init_from)) if settings.init_from else None


def start_files(settings: Settings) -> list[Path]:
    """The files of that adapter which decide what it computes."""
    folder = start_folder(settings)
    named = [folder / name for name in _WEIGHTS] if folder else []
    return [file for file in named if file.is_file()]


def start_companions(settings: Settings) -> list[Path]:
    """The files beside them which decide what it is given: its tokenizer, and its classes."""
    folder = start_folder(settings)
    names = ("tokenizer*", "chat_template*", "*processor_config.json", TASK_FILE)
    return sorted(file for name in names for file in folder.glob(name)) if folder else []


def start_checksums(settings: Settings) -> dict[str, int]:
    """The checksums of those files by their names, as task.json keeps them."""
    return {file.name: checksum(file) for file in start_files(settings)}


def check_start(settings: Settings, recorded: Mapping[str, int]) -> None:
    """Refuse an adapter that is not the one which a run on preferences started from; where nothing
    was recorded, only that there is none.

    Raises:
        AdapterFileError: it is gone, or another is in its place.
    """
    try:
        now = start_checksums(settings)
    except AdapterFileError as error:
        raise AdapterFileError(f"{_COMPARED}, and {error}") from error
    changed = [name for name in recorded if now.get(name) != recorded[name]]
    if changed:
        raise AdapterFileError(
            f"{_COMPARED}, and {start_folder(settings)} now holds another one: "
            f"{', '.join(changed)} changed since. Put the old one back there."
        )


_COMPARED = "the run is compared with the adapter it started from (init_from)"


def check_task(settings: Settings) -> None:
    """Refuse to start a language model from a classifier's adapter, and the like.

    Raises:
        ConfigError: the adapter was trained for a model of another kind.
    """
    folder = start_folder(settings)
    if folder is None:
        return
    record = TaskRecord.load(folder)
    config = read_config(folder)
    its_type = str(getattr(config.task_type, "value", config.task_type) or "")
    kind = _KINDS[record.settings.task] if record else _KINDS_OF_PEFT.get(its_type, its_type)
    if kind and kind != _KINDS[settings.task]:
        raise ConfigError(
            f"init_from {folder} is an adapter for {kind}, and task {settings.task!r} trains "
            f"{_KINDS[settings.task]}. Start from an adapter of the same kind."
        )


def in_its_classes(
    settings: Settings, classes: Classes, *splits: list[Labelled]
) -> tuple[Classes, list[list[Labelled]]]:
    """The classes, and the labels of the rows, as the head of the adapter has them in order.

    Raises:
        ConfigError: the data have classes that it does not know, or `data.labels` another order.
    """
    folder = start_folder(settings)
    record = TaskRecord.load(folder) if folder else None
    its = record.classes if record else None
    if its is None or its.labels == classes.labels:
        return classes, list(splits)
    is_ordered = settings.data.labels or settings.data.glue
    is_known = its.labels and classes.labels and set(classes.labels) <= set(its.labels)
    if is_ordered or not is_known:
        advice = (
            "Leave data.labels out, or give those"
            if settings.data.labels
            else "Name the classes alike in the data"
        )
        raise ConfigError(
            f"init_from {folder} tells {_named(its)} apart, in this order, and the run's data have "
            f"{_named(classes)}. {advice}, or start from another adapter."
        )
    place = {at: its.labels.index(name) for at, name in enumerate(classes.labels)}
    return replace(classes, labels=its.labels), [
        [replace(row, label=place[row.label]) for row in rows]  # pyright: ignore
        for rows in splits
    ]


def holds_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer, or a processor of images, was saved with the weights in `folder`."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


def kept_tokenizer(settings: Settings) -> Path | None:
    """The folder of the adapter that the run starts from, if its tokenizer is there too."""
    folder = start_folder(settings)
    return folder if folder and holds_tokenizer(folder) else None


def _named(classes: Classes) -> str:
    return ", ".join(classes.labels) if classes.labels else "numbers"


def notes_on_start(settings: Settings, model: Any, tokenizer: Any) -> list[str]:
    """What there is to say of the adapter that the run starts from."""
    folder = start_folder(settings)
    if folder is None:
        return []
    of_texts = settings.task != "image-classification"
    kept = of_texts and kept_tokenizer(settings) is not None and not settings.tokenizer
    notes = [
        f"starts from the adapter {folder}: its ranks, alphas and dropout hold"
        + ", and its tokenizer" * kept
    ]
    named = read_config(folder).base_model_name_or_path
    if named and not _same_place(named, settings.model):
        notes.append(
            f"the adapter {folder} names {named!r} as its base, and the run's is "
            f"{settings.model!r}: make sure that the weights are the same"
        )
    is_named = settings.tokenizer or settings.data.chat_template
    if of_texts and kept_tokenizer(settings) and is_named:
        with quiet_loading():
            its = transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=settings.trust_remote_code
            )
        unlike = [
            what
            for what, is_alike in (
                ("tokenizer", its.get_vocab() == tokenizer.get_vocab()),
                ("chat template", its.chat_template == tokenizer.chat_template),
            )
            if not is_alike
        ]
        if unlike:
            notes.append(
                f"the adapter {folder} was trained with another {' and '.join(unlike)} than the "
                f"run's; without tokenizer and data.chat_template its own hold"
            )
    if settings.classifies and TaskRecord.load(folder) is None:
        labels = ", ".join(getattr(model.config, "id2label", {}).values())
        notes.append(
            f"the adapter {folder} does not say which classes its head tells apart; they are "
            f"taken to be, in this order: {labels}"
        )
    return notes


def _same_place(one: str, other: str) -> bool:
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())
