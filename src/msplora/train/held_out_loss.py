"""The loss per token of a language model on held-out rows: one number, whatever the batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from .devices import process_index, sum_over_processes, world_size
from .tokenise_sft import IGNORED, Tokens

PIECE = 2**23
"""Logits that are brought to float32 at once: 32 MiB."""


@torch.no_grad()
def held_out_loss(
    model: Any,
    rows: list[Tokens],
    pad_token_id: int,
    batch_size: int,
    arithmetic: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Return `loss`, `perplexity`, `token_accuracy` and `tokens` over all tokens that count.

    The mean is over tokens, not over batches of different lengths, so that it depends neither on
    the batch size nor on the order of the rows. Several processes share the batches out.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss, right, tokens = 0.0, 0, 0
    # Rows of like length together: less padding to compute.
    rows = sorted(rows, key=lambda row: len(row.input_ids))
    try:
        for batch in _share_of_this_process(rows, batch_size):
            ids, mask, labels = (its.to(device) for its in pad_rows(batch, pad_token_id))
            with autocast(device.type, arithmetic):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for scores, token in counted_pieces(logits, labels):
                # The sum over a whole corpus would lose digits in float32.
                loss_of_each = F.cross_entropy(scores, token, reduction="none").cpu()
                loss += loss_of_each.double().sum().item()
                right += int((scores.argmax(-1) == token).sum())
                tokens += len(token)
    finally:
        model.train(was_training)
    loss, right, tokens = sum_over_processes(loss, right, tokens)
    mean = loss / max(tokens, 1)
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "token_accuracy": right / max(tokens, 1),
        "tokens": int(tokens),
    }


def counted_pieces(
    logits: torch.Tensor, labels: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The logits (tokens, vocabulary) in float32 before each token that counts, and the tokens.

    In pieces: in float32, and once more in the loss, a batch's logits would be several times what
    the model holds. What does not count is left out: with prompts and padding it is most of it.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    length = max(1, PIECE // logits.shape[-1])
    for scores, token in zip(
        logits.flatten(0, 1).split(length), following.split(length), strict=True
    ):
        counted = token != IGNORED
        yield scores[counted].float(), token[counted]


def _share_of_this_process(rows: list[Tokens], batch_size: int) -> Iterator[list[Tokens]]:
    """Batches of the rows, dealt out; every process gets as many, as sharded models have to run."""
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    processes = world_size()
    for place in range(process_index(), math.ceil(len(batches) / processes) * processes, processes):
        # One without a token that counts fills up.
        yield batches[place] if place < len(batches) else [_without_labels(rows[0])]


def _without_labels(row: Tokens) -> Tokens:
    return Tokens(row.place, row.input_ids, [IGNORED] * len(row.input_ids))


def autocast(device: str, arithmetic: torch.dtype) -> AbstractContextManager[Any]:
    """Compute in `arithmetic`; weights that train stay float32."""
    return nullcontext() if arithmetic == torch.float32 else torch.autocast(device, arithmetic)


def pad_rows(rows: list[Tokens], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels of one batch: (rows, longest) each."""
    longest = max(len(row.input_ids) for row in rows)

    def padded(values: list[list[int]], with_: int) -> torch.Tensor:
        return torch.tensor([its + [with_] * (longest - len(its)) for its in values])

    return (
        padded([row.input_ids for row in rows], pad),
        padded([[1] * len(row.input_ids) for row in rows], 0),
        padded([row.labels for row in rows], IGNORED),
    )
