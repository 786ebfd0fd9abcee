"""What `msplora generate` and `predict` say: where they stop, whose odds, in batches as alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

from msplora.train import generation
from msplora.train.base_model import Base
from msplora.train.data_sft import Sample
from msplora.train.generation import continue_prompts, prompt_to_continue
from runs import save_decoder


def decoder(folder: Path, base: Any = None) -> Any:
    """What of a saved run is asked when it generates."""
    save_decoder(folder)
    base = base or hf.AutoModelForCausalLM.from_pretrained(folder)
    words: Any = hf.AutoTokenizer.from_pretrained(folder)
    return SimpleNamespace(base=Base(base, words, torch.float32), model=base)


def answer(run: Any, ids: list[int], **options: Any) -> str:
    return next(continue_prompts(run, [ids], 12, **options))


def test_the_end_token_of_the_tokenizer_ends_what_is_generated(tmp_path: Path) -> None:
    """A base model's generation config does not know the end token of a chat model's tokenizer."""
    run = decoder(tmp_path)
    base, words = run.model, run.base.tokenizer
    base.generation_config.eos_token_id = base.config.eos_token_id = None
    sample = Sample("here", "w1 w2 w3")
    ids = prompt_to_continue(run, sample)
    said = answer(run, ids).split()
    word = next(its for its in said if its != said[0] and its not in sample.prompt.split())
    pair = words.convert_tokens_to_ids([word, words.eos_token])
    weight = base.get_output_embeddings().weight.data
    weight[pair] = weight[pair[::-1]]  # where it said the word, it now says the end token
    assert answer(run, ids).split() == said[: said.index(word)]


def test_the_base_s_generation_config_does_not_bend_the_odds(tmp_path: Path) -> None:
    run = decoder(tmp_path)
    ids = prompt_to_continue(run, Sample("here", "w1 w2 w3"))

    def said() -> list[str]:
        torch.manual_seed(0)
        return [answer(run, ids), answer(run, ids, temperature=2.0)]

    plain = said()
    run.model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, top_k=1)
    assert said() == plain


def test_a_batch_is_answered_as_each_of_its_prompts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any lengths, where an answer ends early, and where positions end it."""
    run = decoder(tmp_path)
    run.model.generation_config.eos_token_id = list(range(2, 20))  # some answers end early
    monkeypatch.setattr(generation, "padding_id", lambda _: 30)  # a word that would be seen
    positions = run.model.config.max_position_embeddings
    lengths = [3, 11, 1, 7, positions - 2, positions - 2, 5, positions - 12, 2]
    asked = [
        torch.randint(5, 50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        for seed, length in enumerate(lengths)
    ]
    alone = [answer(run, ids) for ids in asked]
    sizes = [len(its.split()) for its in alone]
    assert len(set(sizes)) > 3
    assert 12 in sizes
    batches: list[int] = []  # of each size the two that look for what padding does come first
    forward = run.model.generate
    monkeypatch.setattr(
        run.model, "generate", lambda **its: batches.append(len(its["input_ids"])) or forward(**its)
    )
    for size in (2, 4, 100):
        assert list(continue_prompts(run, asked, 12, size)) == alone
    assert batches == [1, 2, 2, 2, 2, 2, 1, 1, 2, 4, 2, 3, 1, 2, 4, 2, 3]


def test_a_model_that_reads_padding_answers_one_at_a_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2}
    run = decoder(tmp_path, hf.RwkvForCausalLM(hf.RwkvConfig(vocab_size=64, **shape)).eval())
    asked = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
    alone = [answer(run, ids) for ids in asked]
    told: list[str] = []
    assert list(continue_prompts(run, asked, 12, 8, told.append)) == alone
    assert len(told) == 1
    assert "one at a time" in told[0]
