"""Let a saved language model continue prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import torch
import transformers

from msplora.errors import ConfigError

from .data_files import DataError
from .data_forms import Form
from .data_sft import Sample, alpaca_prompt
from .end_tokens import end_tokens
from .held_out_loss import autocast
from .lengths import positions_of
from .quiet import quiet_libraries
from .saved_run import SavedRun, open_run
from .sft import padding_id
from .tokenise_sft import prompt_ids

# What the generation config of the base would otherwise do to the model's own odds.
_PLAIN = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
_PLAIN_SAMPLING = {"do_sample": True, "top_k": 0, "typical_p": 1.0}


def generate_text(
    path: Path | str,
    prompt: str,
    base: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    raw: bool = False,
) -> str:
    """Return what the model continues `prompt` with, put in the form it was trained on.

    Args:
        temperature: 0 takes the likeliest token each time.
        raw: give the prompt as it is, outside any template.
    """
    if temperature < 0:
        raise ConfigError(f"--temperature {temperature} is below 0; 0 takes the likeliest token.")
    with quiet_libraries():
        run = open_run(path, base)
        if run.record.classes:
            raise ConfigError(
                f"{path} is a classifier, which generates nothing; use msplora predict."
            )
        transformers.set_seed(seed)
        sample = as_sample(prompt, None if raw else run.record.form)
        asked = [prompt_to_continue(run, sample)]
        found = continue_prompts(run, asked, max_new_tokens, temperature=temperature, top_p=top_p)
        return next(found)


def as_sample(prompt: str, form: Form | None) -> Sample:
    """Put a bare prompt into the form that the model was trained on."""
    if form == "messages":
        return Sample("the prompt", messages=({"role": "user", "content": prompt},))
    return Sample("the prompt", alpaca_prompt(prompt) if form == "alpaca" else prompt)


def prompt_to_continue(run: SavedRun, sample: Sample) -> list[int]:
    """Return the ids of a sample's prompt.

    Raises:
        DataError: nothing can follow it.
    """
    ids = prompt_ids(sample, run.base.tokenizer)
    if not ids:
        raise DataError(f"{sample.place} is empty; give at least one token to continue from.")
    positions = positions_of(run.base.model)
    if positions and len(ids) >= positions:
        raise DataError(
            f"{sample.place}: {len(ids)} tokens, and the model has {positions} positions; nothing "
            f"can follow. Shorten it."
        )
    return ids


def continue_prompts(
    run: SavedRun,
    asked: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 1,
    notify: Callable[[str], None] = lambda _: None,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Iterator[str]:
    """Yield the continuation of each prompt of `prompt_to_continue`: what it would be alone.

    Args:
        notify: is told where the model cannot answer several at once.
    """
    base = run.base
    positions = positions_of(base.model)
    # The tokenizer's own end token among them, which is what the model has learnt to end with:
    # the base's generation config, which alone counts otherwise, may not know it.
    ends = end_tokens(base.tokenizer, base.model.config, base.model.generation_config)
    options: dict[str, Any] = {"eos_token_id": sorted(ends)} if ends else {}
    if temperature > 0:
        options |= _PLAIN_SAMPLING | {"temperature": temperature, "top_p": top_p}
    if min(batch_size, len(asked)) > 1 and not _overlooks_padding(run, asked[0]):
        notify("This model reads the padding of a batch, so rows are answered one at a time.")
        batch_size = 1

    def room(ids: list[int]) -> int:
        return min(max_new_tokens, positions - len(ids)) if positions else max_new_tokens

    # Apart by their room: a batch ends for all at once, and no answer is to be cut for another.
    for most, alike in groupby(asked, room):
        rows = list(alike)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            found = _generate(run, batch, max_new_tokens=most, **options)
            for answer in found[:, max(map(len, batch)) :].tolist():
                said = list(takewhile(lambda its: its not in ends, answer))
                yield base.tokenizer.decode(said, skip_special_tokens=True).strip()


def _overlooks_padding(run: SavedRun, ids: list[int]) -> bool:
    """Whether a prompt's padding changes nothing; some recurrent models take it in as words.

    Seen in the model's own logits: in some only from the second token on.
    """
    ids, two = ids[:2], {"min_new_tokens": 2, "max_new_tokens": 2}
    alone, padded = (
        _generate(run, batch, **two, output_logits=True, return_dict_in_generate=True).logits
        for batch in ([ids], [ids, ids * 2])
    )
    apart = [one[0].float() - other[0].float() for one, other in zip(alone, padded, strict=True)]
    # Rounding, which no two batches share, stays far below; what padding does is far above.
    return bool(torch.stack(apart).abs().max() < alone[0].float().std() / 4)


def _generate(run: SavedRun, batch: list[list[int]], **options: Any) -> Any:
    """What transformers makes of prompts, each padded on the left to the longest."""
    pad, device = padding_id(run.base.tokenizer), run.model.device
    blanks = [max(map(len, batch)) - len(ids) for ids in batch]
    ids = [[pad] * blank + its for blank, its in zip(blanks, batch, strict=True)]
    mask = [[0] * blank + [1] * len(its) for blank, its in zip(blanks, batch, strict=True)]
    with torch.no_grad(), autocast(device.type, run.base.arithmetic):
        return run.model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            pad_token_id=pad,
            **(_PLAIN | options),
        )
