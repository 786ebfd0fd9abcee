"""Several rows in one training sequence, and the proof that none of them sees another."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from msplora.errors import ConfigError

from .lengths import Limit
from .tokenise_sft import Tokens

_SHORTEST = 1024
"""Tokens of a packed sequence where nothing says how many, if the model has as many positions."""

_PROBED = 16
"""Tokens of each row that the proof takes."""


def packed_length(limit: Limit, rows: list[Tokens]) -> int:
    """The tokens of a packed sequence: data.max_length, or room for the longest row."""
    if limit.length:
        return limit.length
    longest = max(len(row.input_ids) for row in rows)
    return max(longest, min(_SHORTEST, limit.positions or _SHORTEST))


def packed_rows(rows: datasets.Dataset, length: int) -> datasets.Dataset:
    """Put rows together by best fit, longest first; none is cut, since none is longer.

    Here and not by the trainer, whose first releases drop the labels, and with them the loss mask.
    """
    return pack_dataset(rows, length, strategy="bfd")


def refuse_leaking(model: Any, rows: list[Tokens]) -> None:
    """Refuse a model in which packed rows see each other.

    Packed rows are told apart by their positions, which begin anew with each of them; whether a
    model's attention heeds that depends on its code. So it is tried: another first row must not
    change what the model says of the second. Flash attention, which needs a GPU and is given the
    rows' limits outright, is taken at its word; so is a model without numbers, of a dry run.

    Raises:
        ConfigError: the second row's logits depend on the first row.
    """
    attention = str(getattr(model.config, "_attn_implementation", None))
    if "flash" in attention or next(model.parameters()).is_meta:
        return
    first, second = _probe(rows)
    other = [(its + 1) % model.config.get_text_config().vocab_size for its in first]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    was_training = model.training
    model.eval()
    logits = []
    try:
        for its in (first, other):
            features = {"input_ids": its + second, "seq_lengths": [len(its), len(second)]}
            batch = collate([features])
            inputs = {
                name: value.to(model.device) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
                if name != "labels"
            }
            with torch.no_grad():
                logits.append(model(**inputs, use_cache=False).logits[0, len(its) :].float())
    finally:
        model.train(was_training)
    apart = (logits[0] - logits[1]).abs().max().item()
    # What a mask shuts out is exactly nothing, but kernels may add up in another order.
    if not apart <= 1e-3 * logits[0].abs().max().item():
        raise ConfigError(
            f"training.packing: in {type(model).__name__} with {attention} attention a packed row "
            f"sees the rows before it (their logits differ by {apart:.2g}), so it would learn to "
            f"answer from them. Leave packing out; training.group_by_length spares padding too."
        )


def warnings_on_cost(model: Any, batch_size: int, accumulation: int) -> list[str]:
    """Whether a batch costs more as one line than its sequences would one by one."""
    attention = str(getattr(model.config, "_attn_implementation", None))
    if "flash" in attention or batch_size == 1:
        return []
    return [
        f"training.packing makes one line of the {batch_size} sequences of a batch, and with "
        f"{attention} attention its cost grows with the square of that line. Set "
        f"training.batch_size: 1 and training.gradient_accumulation: {batch_size * accumulation} "
        f"for the same steps at a fraction of the time."
    ]


def _probe(rows: list[Tokens]) -> tuple[list[int], list[int]]:
    """Two short pieces of rows; of one row alone, the same piece twice."""
    pieces = [row.input_ids[:_PROBED] for row in (rows[0], rows[-1])]
    return pieces[0], pieces[1]
