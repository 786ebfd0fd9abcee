"""Fine-tune an image classifier with transformers' Trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch.utils.data import Dataset
from transformers import Trainer

from .base_model import LoadBase, load_base
from .callbacks import check_steps
from .classification import best_metric, classification_trainer
from .data_classification import Classes
from .data_images import LabelledImage, open_image, read_images
from .held_out_rows import HeldOutRows
from .init_from import in_its_classes, start_checksums
from .job import Job
from .methods import adapt
from .settings import Settings
from .task_record import TaskRecord
from .trainer_arguments import trainer_arguments, training_steps


class Pixels(Dataset):
    """Images as the model takes them, each read when it is its turn."""

    def __init__(self, images: list[LabelledImage], processor: Any) -> None:
        self.images = images
        self.processor = processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> dict[str, Any]:
        image = self.images[place]
        found = self.processor(open_image(image), return_tensors="pt")
        # Pixels, and of a processor that leaves images their form (SigLIP2's) also which.
        row: dict[str, Any] = {
            name: found[name][0] for name in self.processor.model_input_names if name in found
        }
        return row if image.label is None else row | {"labels": image.label}


def prepare(settings: Settings, load: LoadBase = load_base) -> Job:
    """Look at the images, load the model and apply the method."""
    train, held_out, classes = read_images(settings.data, settings.seed)
    classes, (train, held_out) = in_its_classes(settings, classes, train, held_out)
    best = best_metric(settings, classes)
    base = load(settings, classes)
    train_rows, held_rows = Pixels(train, base.tokenizer), Pixels(held_out, base.tokenizer)
    check_steps(settings, training_steps(settings, len(train)))
    adapted = adapt(base, settings)

    def make_trainer(checkpoints: Path) -> Trainer:
        arguments = trainer_arguments(settings, base, checkpoints, len(train), True, best)
        if torch.cuda.is_available():
            # Decoding takes the processor longer than a step takes the GPU.
            arguments["dataloader_num_workers"] = min(4, os.cpu_count() or 1)
        return classification_trainer(
            settings, base, classes, adapted.model, arguments, train_rows, held_rows
        )

    return Job(
        base,
        adapted,
        TaskRecord(
            settings,
            classes=classes,
            held_out=HeldOutRows.of(held_out),
            start=start_checksums(settings),
            dtype=base.dtype,
        ),
        best,
        held_out=True,
        data_notes=[
            f"{len(classes.labels)} classes: {_few(classes.labels)}",
            f"training: {len(train)} images",
            f"held out: {len(held_out)} images",
        ],
        sample=_sample(train[0], train_rows, classes),
        make_trainer=make_trainer,
    )


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _sample(image: LabelledImage, rows: Pixels, classes: Classes) -> Text:
    width, height = open_image(image).size
    pixels = " × ".join(map(str, reversed(rows[0]["pixel_values"].shape)))
    text = Text(f"{image.place}: {width} × {height}, given to the model as {pixels}")
    assert image.label is not None
    return text.append(f"\n→ {classes.label_column} = {classes.labels[image.label]}", style="green")
