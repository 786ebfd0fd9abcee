"""Let a saved language model continue a prompt."""

from __future__ import annotations

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
_PLAIN = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
_PLAIN_SAMPLING = {"top_k": 0, "typical_p": 1.0}


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
        asked = prompt_to_continue(run, sample)
        return continue_prompt(run, asked, max_new_tokens, temperature, top_p)


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


def continue_prompt(
    run: SavedRun,
    ids: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> str:
    """Return the continuation of a prompt of `prompt_to_continue`."""
    tokenizer, positions = run.base.tokenizer, positions_of(run.base.model)
    if positions:
        max_new_tokens = min(max_new_tokens, positions - len(ids))
    inputs = torch.tensor([ids], device=run.model.device)
    options: dict[str, Any] = {"do_sample": temperature > 0, **_PLAIN}
    # The tokenizer's own end token among them, which is what the model has learnt to end with:
    # the base's generation config, which alone counts otherwise, may not know it.
    ends = end_tokens(tokenizer, run.base.model.config, run.base.model.generation_config)
    if ends:
        options["eos_token_id"] = sorted(ends)
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, **_PLAIN_SAMPLING}
    with torch.no_grad(), autocast(inputs.device.type, run.base.arithmetic):
        found = run.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            pad_token_id=padding_id(tokenizer),
            **options,
        )
    return tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True).strip()
