"""Learn from preferences with TRL's DPOTrainer: the preferred answer against the other."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from msplora.errors import ConfigError
from msplora.loading import read_config

from .base_model import Base, LoadBase, load_base
from .callbacks import check_steps
from .data_preference import read_preferences
from .held_out_loss import autocast
from .held_out_rows import HeldOutRows
from .held_out_trainer import JudgesHeldOutRows
from .init_from import start_checksums, start_folder
from .job import Job
from .length_groups import GroupsByLength
from .methods import adapt, refuse_adapted_output
from .outline import outline
from .preference_rows import pair_sample, prepare_rows
from .quantisation import trained_in_float32
from .run_trainer import RunTrainer
from .settings import Settings
from .settings_checks import check_metric
from .sft import padding_id
from .task_record import TaskRecord
from .tokenise_preference import PairTokens
from .trainer_arguments import quieten, trainer_arguments, training_steps
from .weightless import is_weightless

_REFERENCE = "ref"
"""TRL's name for the adapter that it compares with; without one it turns the adapters off."""

REWARDS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
"""TRL's names: the share of pairs in the right order, by how much, and the two halves of that."""


class HeldOutDPOTrainer(GroupsByLength, JudgesHeldOutRows, RunTrainer, DPOTrainer):
    """TRL's trainer on pairs that are token ids already, judging by the mean over all pairs.

    `arithmetic` has to be set before it evaluates.
    """

    arithmetic: torch.dtype

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """Keep the rows: TRL would tokenise texts, in a form of its own."""
        return dataset

    def row_lengths(self, rows: Any) -> list[int]:
        """The tokens of each pair: of its prompt and the longer answer."""
        columns = (rows[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        return [
            len(prompt) + max(len(chosen), len(rejected))
            for prompt, chosen, rejected in zip(*columns, strict=True)
        ]

    def measure(self) -> dict[str, float]:
        """Return the loss and the rewards of the held-out pairs."""
        totals: dict[str, float] = dict.fromkeys(("loss", *REWARDS), 0.0)
        rows = 0
        for pairs, found in self._measured(self.args.per_device_eval_batch_size):
            rows += pairs
            for name, value in found.items():
                totals[name] += value * pairs
        return {name: total / rows for name, total in totals.items()}

    def losses(self) -> torch.Tensor:
        """The loss of each held-out pair by itself: float64 (pairs,)."""
        found = [its["loss"] for _, its in self._measured(1)]
        return torch.tensor(found, dtype=torch.float64)

    @torch.no_grad()
    def _measured(self, size: int) -> Iterator[tuple[int, dict[str, float]]]:
        """For every batch of held-out pairs: how many they are, and the means over them."""
        assert self.model is not None
        was_training = self.model.training
        self.model.eval()
        rows: list[Any] = list(self.eval_dataset)  # pyright: ignore[reportArgumentType]
        seen = self._metrics["eval"]
        try:
            for start in range(0, len(rows), size):
                pairs = rows[start : start + size]
                batch = self._prepare_inputs(self.data_collator(pairs))
                # While it trains, accelerate has put the same around the model's forward.
                with autocast(self.args.device.type, self.arithmetic):
                    loss = self.compute_loss(self.model, batch)
                yield len(pairs), {"loss": float(loss), **{its: seen[its][-1] for its in REWARDS}}
        finally:
            seen.clear()
            self.model.train(was_training)


def prepare(settings: Settings, load: LoadBase = load_base) -> Job:
    """Read the pairs, load the model and apply the method."""
    _check_start(settings)
    data = read_preferences(settings.data, settings.seed)
    best = check_metric(settings, "loss", ("loss", "rewards/accuracies", "rewards/margins"))
    described = outline(settings, None)
    rows = prepare_rows(data, described.tokenizer, described.limit, described.ends)
    train, held_out, notes = rows.train, rows.held_out, rows.notes
    if settings.method != "full" and settings.adapter.lora_dropout:
        notes.append("task dpo trains without dropout, so adapter.lora_dropout is not read")
    check_steps(settings, training_steps(settings, len(train)))
    base = load(settings, None)
    adapted = adapt(base, settings)
    notes.append(f"reference: {_reference_in_words(settings)}")
    refuse_adapted_output(adapted.model, settings.task)

    def make_trainer(checkpoints: Path) -> DPOTrainer:
        arguments = trainer_arguments(settings, base, checkpoints, len(train), bool(held_out), best)
        reference = None
        if settings.method == "full":
            reference = copy.deepcopy(adapted.model).requires_grad_(False)
        return preference_trainer(
            settings, base, adapted.model, arguments, train, held_out, reference
        )

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
        held_out=bool(held_out),
        data_notes=notes,
        sample=pair_sample(train[0], base.tokenizer),
        make_trainer=make_trainer,
        check=rows.check,
    )


def preference_trainer(
    settings: Settings,
    base: Base,
    model: Any,
    arguments: dict[str, Any],
    train: list[PairTokens],
    held_out: list[PairTokens],
    reference: Any = None,
) -> HeldOutDPOTrainer:
    """Make the trainer that trains and evaluates.

    An adapter is compared with the model it started from: the base, or the base with the adapter
    that `init_from` names. A model without an adapter needs a `reference`, a second model.
    """
    with trained_in_float32(model):
        trainer = HeldOutDPOTrainer(
            model=model,
            ref_model=reference,
            args=DPOConfig(
                **arguments,
                beta=settings.training.dpo_beta,
                loss_type=[settings.training.dpo_loss],
                max_length=None,  # cut already, and counted
            ),
            train_dataset=_dataset(train),
            eval_dataset=_dataset(held_out) if held_out else None,
            processing_class=base.tokenizer,
            data_collator=DataCollatorForPreference(padding_id(base.tokenizer)),
        )
    if isinstance(model, peft.PeftModel):
        _set_reference(model, settings)
    trainer.settings, trainer.head = settings, base.head
    trainer.arithmetic = base.arithmetic
    trainer.group_by_length = settings.training.group_by_length
    quieten(trainer)
    return trainer


def _set_reference(model: peft.PeftModel, settings: Settings) -> None:
    """Put the start of the run in the place of TRL's copy of the adapter as it now is.

    Where the run began without an adapter, none is kept: TRL then turns the one that trains off.
    """
    if _REFERENCE in model.peft_config:
        model.delete_adapter(_REFERENCE)
    start = start_folder(settings)
    if start and is_weightless(model):  # a rehearsal: shaped by its config, and no file is read
        config = read_config(start)
        config.inference_mode = True
        model.add_adapter(_REFERENCE, config)
    elif start:
        model.load_adapter(str(start), _REFERENCE)


def _check_start(settings: Settings) -> None:
    """Refuse a start that cannot be held beside what trains: the base has one bias for both."""
    start = start_folder(settings)
    bias = getattr(read_config(start), "bias", "none") if start else "none"
    if bias != "none":
        raise ConfigError(
            f"the adapter {settings.init_from!r} has trained biases of the base (bias = {bias!r}). "
            f"Task 'dpo' compares with that adapter as it was, and PEFT keeps no second set of "
            f"biases. Start from one without, or merge it (msplora convert --to merged) and train "
            f"on the merged model."
        )


def _reference_in_words(settings: Settings) -> str:
    if settings.method == "full":
        return "a second copy of the model as it was"
    if settings.init_from:
        return f"the base with the adapter {settings.init_from}"
    return "the base without the adapter"


def _dataset(rows: list[PairTokens]) -> datasets.Dataset:
    return datasets.Dataset.from_list([asdict(row) for row in rows])
