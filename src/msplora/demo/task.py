"""The task the adapters teach: write five words in reverse order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .corpus import LISTED
from .perplexity import IGNORED

LENGTH = 5
"""Words in a list."""
SEED = 2503
HELD_OUT = 500


@dataclass(frozen=True)
class Example:
    """One question with its answer."""

    words: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """What the model is given."""
        return f"reverse : {' '.join(self.words)} ->"

    @property
    def answer(self) -> str:
        """What it has to write, before it ends the document."""
        return " ".join(reversed(self.words))


def split(training: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, no list of words in both; the held-out ones never change."""
    source = random.Random(SEED)
    seen: set[tuple[str, ...]] = set()
    examples: list[Example] = []
    while len(examples) < HELD_OUT + training:
        words = tuple(source.sample(LISTED, LENGTH))
        if words not in seen:
            seen.add(words)
            examples.append(Example(words))
    return examples[HELD_OUT:], examples[:HELD_OUT]


def rows(examples: Sequence[Example], tokenizer: Any) -> list[dict[str, list[int]]]:
    """The examples as the Trainer takes them; only answers count for the loss.

    All have the same number of tokens, since every word is one: no padding, no attention mask.
    """
    encoded = []
    for example in examples:
        prompt = tokenizer(example.prompt)["input_ids"]
        answer = [*tokenizer(example.answer)["input_ids"], tokenizer.eos_token_id]
        encoded.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    return encoded


def exact_match(model: Any, encoded: Sequence[dict[str, list[int]]], batch: int = 250) -> float:
    """The share of answers that greedy decoding gets right from the first word to the end.

    One forward pass per batch tells: greedy decoding writes the whole answer exactly if the
    likeliest token after each beginning of it is the next one.
    """
    training = model.training
    model.eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, len(encoded), batch):
            part = encoded[start : start + batch]
            ids = torch.tensor([row["input_ids"] for row in part], device=model.device)
            labels = torch.tensor([row["labels"] for row in part], device=model.device)[:, 1:]
            likeliest = model(input_ids=ids).logits[:, :-1].argmax(-1)
            right += int(((likeliest == labels) | (labels == IGNORED)).all(-1).sum())
    model.train(training)
    return right / len(encoded)


def write(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model writes after `prompt`, token by token, as a user would have it."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
    with torch.inference_mode():
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3 * LENGTH,
            do_sample=False,
        )
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
