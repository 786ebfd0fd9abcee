"""Supervised fine-tuning of a language model with TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from rich.text import Text
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from msplora.errors import ConfigError

from .base_model import LoadBase, load_base
from .callbacks import check_stages
from .data_sft import read_sft
from .held_out_loss import held_out_loss
from .held_out_trainer import JudgesHeldOutRows
from .job import Job
from .lengths import row_limit
from .methods import adapt
from .quantisation import trained_in_float32
from .run_trainer import RunTrainer
from .settings import Settings
from .settings_file import check_metric
from .task_record import TaskRecord
from .tokenise_sft import DEFAULT_CHUNK, IGNORED, Tokens, tokenise_samples
from .trainer_arguments import quieten, trainer_arguments, training_steps, warmup_steps

METRICS = ("loss", "perplexity", "token_accuracy")


class HeldOutSFTTrainer(JudgesHeldOutRows, RunTrainer, SFTTrainer):
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
    base = load(settings, None)
    limit = row_limit(settings, base.model)
    tokenizer, completions = base.tokenizer, settings.training.completion_only_loss
    rows = settings.data.max_rows
    train, report = tokenise_samples(
        data.train, data.form, tokenizer, limit, "training", completions, rows
    )
    notes = [f"form: {data.form}", f"training: {report}"]
    held_out: list[Tokens] = []
    if data.held_out:
        held_out, report = tokenise_samples(
            data.held_out, data.form, tokenizer, limit, "held-out", completions, rows
        )
        notes.append(f"held out: {report}")
    if data.left_out:
        notes.append(f"left out: {data.left_out} rows with an empty completion")
    if tokenizer.eos_token_id is None and data.form != "text-file":
        notes.append("the tokenizer has no end token, so the model does not learn to stop")
    packed_length = limit.length or limit.positions or DEFAULT_CHUNK
    if settings.training.packing and tokenizer.pad_token is None:
        raise ConfigError("training.packing needs a tokenizer with a padding or end token.")
    if not settings.training.packing:  # how many rows that gives, the trainer finds out
        check_stages(settings, training_steps(settings, len(train)))
    adapted = adapt(base, settings)

    def make_trainer(checkpoints: Path) -> SFTTrainer:
        arguments = trainer_arguments(settings, base, checkpoints, len(train), bool(held_out), best)
        with trained_in_float32(adapted.model):
            trainer = HeldOutSFTTrainer(
                model=adapted.model,
                args=SFTConfig(
                    **arguments,
                    packing=settings.training.packing,
                    max_length=packed_length if settings.training.packing else None,
                ),
                train_dataset=_dataset(train),
                eval_dataset=_dataset(held_out) if held_out else None,
                processing_class=tokenizer,
                # Our own, so that a tokenizer with neither padding nor end token will do.
                data_collator=(
                    None if settings.training.packing else DataCollatorForLanguageModeling(pad)
                ),
            )
        trainer.settings, trainer.head = settings, base.head
        # Only now is it known how many rows are left once they are packed.
        packed: Any = trainer.train_dataset
        trainer.args.warmup_steps = warmup_steps(settings, len(packed))
        trainer.held_out, trainer.pad_token_id = held_out, pad
        trainer.arithmetic = base.arithmetic
        quieten(trainer)
        return trainer

    pad = padding_id(tokenizer)
    return Job(
        base,
        adapted,
        TaskRecord(settings, form=data.form),
        best,
        held_out=bool(held_out),
        data_notes=notes,
        sample=masked_sample(train[0], tokenizer),
        make_trainer=make_trainer,
    )


def padding_id(tokenizer: Any) -> int:
    """The id to pad with; any will do, since padding is masked."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def masked_sample(row: Tokens, tokenizer: Any) -> Text:
    """Decode a row: what the loss counts is green and stands between ▶ and ◀."""
    shown = Text()
    start = 0
    while start < len(row.input_ids):
        counted = row.labels[start] != IGNORED
        stop = start
        while stop < len(row.input_ids) and (row.labels[stop] != IGNORED) == counted:
            stop += 1
        piece = tokenizer.decode(row.input_ids[start:stop])
        shown.append(f"▶{piece}◀" if counted else piece, style="green" if counted else "dim")
        start = stop
    return shown


def _dataset(rows: list[Tokens]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    )
