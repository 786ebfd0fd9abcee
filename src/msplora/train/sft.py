"""Supervised fine-tuning of a language model with TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from msplora.errors import ConfigError

from .base_model import LoadBase, load_base
from .callbacks import check_steps
from .data_sft import read_sft
from .held_out_loss import held_out_loss
from .held_out_rows import HeldOutRows
from .held_out_trainer import JudgesHeldOutRows
from .init_from import start_checksums
from .job import Job
from .length_groups import GroupsByLength
from .methods import adapt, refuse_adapted_output
from .outline import outline
from .packing import packed_length, packed_rows, refuse_leaking, warnings_on_cost
from .quantisation import trained_in_float32
from .run_trainer import RunTrainer
from .settings import Settings
from .settings_checks import check_metric
from .sft_rows import masked_sample, prepare_rows
from .task_record import TaskRecord
from .tokenise_sft import Tokens
from .trainer_arguments import quieten, trainer_arguments, training_steps

METRICS = ("loss", "perplexity", "token_accuracy")


class HeldOutSFTTrainer(GroupsByLength, JudgesHeldOutRows, RunTrainer, SFTTrainer):
    """TRL's trainer, judging by the loss per token."""

    held_out: list[Tokens]
    pad_token_id: int
    arithmetic: Any

    def measure(self) -> dict[str, float]:
        """Return the loss per token of the held-out rows."""
        return held_out_loss(
            self.model,
            self.held_out,
            self.pad_token_id,
            self.args.per_device_eval_batch_size,
            self.arithmetic,
        )


def prepare(settings: Settings, load: LoadBase = load_base) -> Job:
    """Read the data, load the model and apply the method."""
    data = read_sft(settings.data, settings.seed)
    best = check_metric(settings, "loss", METRICS)
    described = outline(settings, None)
    tokenizer, limit = described.tokenizer, described.limit
    rows = prepare_rows(settings, data, tokenizer, limit, described.ends)
    train, packing = _dataset(rows.train), settings.training.packing
    if packing:
        if tokenizer.pad_token is None:
            raise ConfigError("training.packing needs a tokenizer with a padding or end token.")
        train = packed_rows(train, packed_length(limit, rows.train))
    check_steps(settings, training_steps(settings, len(train)))
    base = load(settings, None)
    if packing:
        refuse_leaking(base.model, rows.train)
        training = settings.training
        rows.check.warnings += warnings_on_cost(
            base.model, training.batch_size, training.gradient_accumulation
        )
    adapted = adapt(base, settings)
    refuse_adapted_output(adapted.model, settings.task)

    def make_trainer(checkpoints: Path) -> SFTTrainer:
        held_out = bool(rows.held_out)
        arguments = trainer_arguments(settings, base, checkpoints, len(train), held_out, best)
        with trained_in_float32(adapted.model):
            trainer = HeldOutSFTTrainer(
                model=adapted.model,
                args=SFTConfig(
                    **arguments,
                    max_length=None,  # every row has its length already
                    padding_free=packing,
                ),
                train_dataset=train,
                eval_dataset=_dataset(rows.held_out) if held_out else None,
                processing_class=tokenizer,
                # Our own, so that a tokenizer with neither padding nor end token will do.
                data_collator=None if packing else DataCollatorForLanguageModeling(pad),
            )
        trainer.settings, trainer.head = settings, base.head
        trainer.held_out, trainer.pad_token_id = rows.held_out, pad
        trainer.arithmetic = base.arithmetic
        trainer.group_by_length = settings.training.group_by_length
        quieten(trainer)
        return trainer

    pad = padding_id(tokenizer)
    return Job(
        base,
        adapted,
        TaskRecord(
            settings,
            forms=data.forms,
            held_out=HeldOutRows.of(data.held_out),
            start=start_checksums(settings),
            dtype=base.dtype,
        ),
        best,
        held_out=bool(rows.held_out),
        data_notes=rows.notes,
        sample=masked_sample(rows.train[0], tokenizer),
        make_trainer=make_trainer,
        check=rows.check,
    )


def padding_id(tokenizer: Any) -> int:
    """The id to pad with; any will do, since padding is masked."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def _dataset(rows: list[Tokens]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    )
