"""Supervised fine-tuning of a language model with TRL's SFTTrainer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import datasets
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from msplora.errors import ConfigError

from .base_model import load_base
from .data_sft import read_sft
from .held_out_loss import held_out_loss
from .job import Job
from .length_groups import GroupsByLength
from .lengths import row_limit
from .methods import adapt
from .packing import packed_length, packed_rows, refuse_leaking
from .settings import Settings
from .settings_file import check_metric
from .sft_rows import end_tokens, masked_sample, prepare_rows
from .task_record import TaskRecord
from .tokenise_sft import Tokens
from .trainer_arguments import optimizer, quieten, trainer_arguments

METRICS = ("loss", "perplexity", "token_accuracy")


class HeldOutSFTTrainer(GroupsByLength, SFTTrainer):
    """TRL's trainer, judging by the loss per token that `msplora eval` gives too.

    Its own evaluation averages the means of batches, which depends on how rows fall into batches.
    """

    held_out: list[Tokens]
    pad_token_id: int
    arithmetic: Any

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the held-out rows, and log what was found."""
        start = time.perf_counter()
        found = held_out_loss(
            self.model,
            self.held_out,
            self.pad_token_id,
            self.args.per_device_eval_batch_size,
            self.arithmetic,
        )
        metrics = {f"eval_{name}": value for name, value in found.items()}
        metrics["eval_runtime"] = round(time.perf_counter() - start, 4)
        assert self.model is not None
        self.model.eval()  # TRL files what is logged under training otherwise
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def prepare(settings: Settings) -> Job:
    """Read the data, load the model and apply the method."""
    data = read_sft(settings.data, settings.seed)
    best = check_metric(settings, "loss", METRICS)
    base = load_base(settings, None)
    tokenizer, limit = base.tokenizer, row_limit(settings, base.model)
    ends = end_tokens(tokenizer, base.model.config, base.model.generation_config)
    rows = prepare_rows(settings, data, tokenizer, limit, ends)
    if settings.training.packing:
        if tokenizer.pad_token is None:
            raise ConfigError("training.packing needs a tokenizer with a padding or end token.")
        refuse_leaking(base.model, rows.train)
    adapted = adapt(base, settings)

    def make_trainer(checkpoints: Path) -> SFTTrainer:
        held_out, packing = bool(rows.held_out), settings.training.packing
        train = _dataset(rows.train)
        if packing:
            train = packed_rows(train, packed_length(limit, rows.train))
        arguments = trainer_arguments(settings, base, checkpoints, len(train), held_out, best)
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
            optimizers=(optimizer(adapted.model, settings, base.head), None),
        )
        trainer.held_out, trainer.pad_token_id = rows.held_out, pad
        trainer.arithmetic = base.arithmetic
        trainer.group_by_length = settings.training.group_by_length
        quieten(trainer)
        return trainer

    pad = padding_id(tokenizer)
    return Job(
        base,
        adapted,
        TaskRecord(settings, form=data.forms[0], more_forms=data.forms[1:]),
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
