"""Fine-tune a classifier, or a regression, with transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from msplora.errors import ConfigError

from .base_model import Base, LoadBase, load_base
from .callbacks import check_steps
from .classification_rows import labelled_data, labelled_sample, prepare_rows
from .data_classification import Classes
from .held_out_rows import HeldOutRows
from .init_from import start_checksums
from .job import Job
from .length_groups import GroupsByLength
from .methods import adapt
from .metrics import metrics_for, predictions
from .outline import outline
from .run_trainer import RunTrainer
from .settings import Settings
from .settings_checks import check_metric
from .task_record import TaskRecord
from .trainer_arguments import quieten, trainer_arguments, training_steps


class ClassificationTrainer(GroupsByLength, RunTrainer):
    """transformers' trainer, with batches of like length where they are asked for."""


def prepare(settings: Settings, load: LoadBase = load_base) -> Job:
    """Read the data, load the model and apply the method."""
    data = labelled_data(settings)
    classes = data.classes
    best = best_metric(settings, classes)
    described = outline(settings, classes)
    if described.tokenizer.pad_token is None:
        raise ConfigError(
            f"the tokenizer of {settings.tokenizer or settings.model} has no token for padding, "
            f"for the end or for unknown words, so rows cannot be put into batches. Name another "
            f"as tokenizer."
        )
    rows = prepare_rows(settings, data, described.tokenizer, described.limit)
    check_steps(settings, training_steps(settings, len(rows.train)))
    base = load(settings, classes)
    adapted = adapt(base, settings)

    def make_trainer(checkpoints: Path) -> Trainer:
        arguments = trainer_arguments(settings, base, checkpoints, len(rows.train), True, best)
        return classification_trainer(
            settings, base, classes, adapted.model, arguments, rows.train, rows.held_out
        )

    return Job(
        base,
        adapted,
        TaskRecord(
            settings,
            classes=classes,
            held_out=HeldOutRows.of(data.held_out),
            start=start_checksums(settings),
            dtype=base.dtype,
        ),
        best,
        held_out=True,
        data_notes=rows.notes,
        sample=labelled_sample(rows.train[0], base.tokenizer, classes),
        make_trainer=make_trainer,
        check=rows.check,
    )


def classification_trainer(
    settings: Settings,
    base: Base,
    classes: Classes,
    model: Any,
    arguments: dict[str, Any],
    train_rows: Any = None,
    held_rows: Any = None,
) -> Trainer:
    """Make the trainer that trains and evaluates; evaluation alone needs no training rows."""
    of_images = settings.task == "image-classification"
    compute, _ = metrics_for(settings.data.glue, classes.regression, of_images)
    trainer = ClassificationTrainer(
        model=model,
        args=TrainingArguments(**arguments, label_names=["labels"]),
        train_dataset=train_rows,
        eval_dataset=held_rows,
        data_collator=(
            default_data_collator if of_images else DataCollatorWithPadding(base.tokenizer)
        ),
        compute_metrics=lambda found: compute(
            predictions(found.predictions, classes.regression), _labels(found.label_ids)
        ),
    )
    trainer.settings, trainer.head = settings, base.head
    trainer.group_by_length = settings.training.group_by_length
    # A classifier's loss is a mean over its rows. Most of them take the keywords that tell the
    # trainer otherwise, and it would multiply the loss by the batches or processes of a step.
    trainer.model_accepts_loss_kwargs = False
    quieten(trainer)
    return trainer


def best_metric(settings: Settings, classes: Classes) -> str:
    """The metric that picks the best epoch: the task's own unless another is asked for."""
    of_images = settings.task == "image-classification"
    compute, usual = metrics_for(settings.data.glue, classes.regression, of_images)
    import numpy as np

    names = ["loss", *compute(np.array([0, 1]), np.array([0, 1]))]
    return check_metric(settings, usual, names)


def _labels(label_ids: Any) -> Any:
    return label_ids[0] if isinstance(label_ids, tuple) else label_ids
