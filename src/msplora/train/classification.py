"""Fine-tune a classifier, or a regression, with transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text
from transformers import (
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from msplora.errors import ConfigError

from .base_model import Base, LoadBase, load_base
from .callbacks import check_stages
from .data_classification import Classes, read_classification
from .job import Job
from .lengths import row_limit
from .methods import adapt
from .metrics import metrics_for, predictions
from .run_trainer import RunTrainer
from .settings import Settings
from .settings_file import check_metric
from .task_record import TaskRecord
from .tokenise_classification import tokenise_examples
from .trainer_arguments import quieten, trainer_arguments, training_steps


def prepare(settings: Settings, load: LoadBase = load_base) -> Job:
    """Read the data, load the model and apply the method."""
    train, held_out, classes = read_classification(settings.data, settings.seed)
    best = best_metric(settings, classes)
    base = load(settings, classes)
    if base.tokenizer.pad_token is None:
        raise ConfigError(
            f"the tokenizer of {settings.tokenizer or settings.model} has no token for padding, "
            f"for the end or for unknown words, so rows cannot be put into batches. Name another "
            f"as tokenizer."
        )
    limit = row_limit(settings, base.model)
    train_rows, train_report = tokenise_examples(train, base.tokenizer, limit, "training")
    held_rows, held_report = tokenise_examples(held_out, base.tokenizer, limit, "held-out")
    check_stages(settings, training_steps(settings, len(train_rows)))
    adapted = adapt(base, settings)

    def make_trainer(checkpoints: Path) -> Trainer:
        arguments = trainer_arguments(settings, base, checkpoints, len(train_rows), True, best)
        return classification_trainer(
            settings, base, classes, adapted.model, arguments, train_rows, held_rows
        )

    return Job(
        base,
        adapted,
        TaskRecord(settings, classes=classes),
        best,
        held_out=True,
        data_notes=[f"training: {train_report}", f"held out: {held_report}"],
        sample=_sample(train_rows[0], base.tokenizer, classes),
        make_trainer=make_trainer,
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
    trainer = RunTrainer(
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


def _sample(row: dict[str, Any], tokenizer: Any, classes: Classes) -> Text:
    label = row["labels"] if classes.regression else classes.labels[int(row["labels"])]
    text = Text(tokenizer.decode(row["input_ids"]))
    return text.append(f"\n→ {classes.label_column} = {label}", style="green")
