"""Where `msplora generate` and `predict` stop, and that they take the model's own odds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf

from msplora.train.base_model import Base
from msplora.train.data_sft import Sample
from msplora.train.generation import continue_prompt, prompt_to_continue
from runs import save_decoder


def test_the_end_token_of_the_tokenizer_ends_what_is_generated(tmp_path: Path) -> None:
    """A base model's generation config does not know the end token of a chat model's tokenizer."""
    save_decoder(tmp_path)
    base: Any = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    words: Any = hf.AutoTokenizer.from_pretrained(tmp_path)
    base.generation_config.eos_token_id = base.config.eos_token_id = None
    run: Any = SimpleNamespace(base=Base(base, words, torch.float32), model=base)
    sample = Sample("here", "w1 w2 w3")
    ids = prompt_to_continue(run, sample)
    said = continue_prompt(run, ids, 12).split()
    word = next(its for its in said if its != said[0] and its not in sample.prompt.split())
    pair = words.convert_tokens_to_ids([word, words.eos_token])
    weight = base.get_output_embeddings().weight.data
    weight[pair] = weight[pair[::-1]]  # where it said the word, it now says the end token
    assert continue_prompt(run, ids, 12).split() == said[: said.index(word)]


def test_the_base_s_generation_config_does_not_bend_the_odds(tmp_path: Path) -> None:
    save_decoder(tmp_path)
    base: Any = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    words: Any = hf.AutoTokenizer.from_pretrained(tmp_path)
    run: Any = SimpleNamespace(base=Base(base, words, torch.float32), model=base)
    ids = prompt_to_continue(run, Sample("here", "w1 w2 w3"))

    def said() -> list[str]:
        torch.manual_seed(0)
        return [continue_prompt(run, ids, 12), continue_prompt(run, ids, 12, temperature=2.0)]

    plain = said()
    base.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, top_k=1)
    assert said() == plain
