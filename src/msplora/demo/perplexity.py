"""How well a model predicts text of the corpus, beside a model that only counts words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

IGNORED = -100
"""The label of a token that counts for no loss, as transformers has it."""


def encode(text: Iterable[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each line, closed by the token that ends a document."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(text))["input_ids"]]


def padded(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """One tensor of sequences of unequal length, filled up on the right."""
    length = max(map(len, sequences))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in sequences])


def model_perplexity(model: Any, sequences: Sequence[Sequence[int]], batch: int = 256) -> float:
    """Perplexity per token. The first token of a line is given, since nothing precedes it."""
    total, tokens = 0.0, 0
    pad = model.config.pad_token_id
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(sequences), batch):
            part = sequences[start : start + batch]
            ids = padded(part, pad).to(model.device)
            labels = padded(part, IGNORED)[:, 1:].to(model.device)
            logits = model(input_ids=ids, attention_mask=(ids != pad).long()).logits[:, :-1]
            total += float(
                torch.nn.functional.cross_entropy(
                    logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum"
                )
            )
            tokens += int((labels != IGNORED).sum())
    return math.exp(total / tokens)


def unigram_perplexity(
    training: Iterable[Sequence[int]], held_out: Iterable[Sequence[int]], vocabulary: int
) -> float:
    """The same, of a model that knows only how often each word comes (add-one smoothing)."""
    counts = Counter(token for row in training for token in row[1:])
    total = sum(counts.values()) + vocabulary
    tokens = [token for row in held_out for token in row[1:]]
    loss = -sum(math.log((counts[token] + 1) / total) for token in tokens)
    return math.exp(loss / len(tokens))
