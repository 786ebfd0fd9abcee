"""Pretrain the demo's language model from nothing, and write its model card.

    python scripts/pretrain_demo_model.py --output src/msplora/demo/model

A Llama of 12 layers learns the corpus of `msplora.demo.corpus`, which a grammar writes from a seed.
It needs torch, transformers and tokenizers. The weights are stored in float16 and load as float32.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from msplora.demo.corpus import GAMES, lines, vocabulary
from msplora.demo.perplexity import (
    IGNORED,
    encode,
    model_perplexity,
    padded,
    unigram_perplexity,
)
from msplora.demo.task import exact_match, rows, split

SPECIAL = ("<pad>", "<eos>", "<unk>")
HELD_OUT_LINES = 2000
LINES_OF_A_GAME = 200


def main() -> None:
    """Write the corpus, train, measure, save."""
    given = _arguments()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(given.seed)
    started = time.perf_counter()
    tokenizer = make_tokenizer()
    training = list(itertools.islice(lines(given.seed), given.lines))
    known = set(training)
    fresh = (line for line in lines(given.seed + 1) if line not in known)
    held_out = encode(itertools.islice(fresh, HELD_OUT_LINES), tokenizer)
    sequences = encode(training, tokenizer)
    print(f"corpus: {given.lines:,} lines, {time.perf_counter() - started:.0f} s", flush=True)

    model = LlamaForCausalLM(make_config(len(tokenizer), tokenizer)).to(given.device)
    loss = train(model, padded(sequences, SPECIAL.index("<pad>")), given, held_out)

    # What is measured is what is stored: rounded to float16.
    model = model.half().float().eval()
    _, task = split(0)
    numbers = {
        "loss": loss,
        "perplexity": model_perplexity(model, held_out),
        "unigram": unigram_perplexity(sequences, held_out, len(tokenizer)),
        "reversed": exact_match(model, rows(task, tokenizer)),
        "games": games_right(model, tokenizer),
        "parameters": sum(its.numel() for its in model.parameters()),
        "tokens": sum(map(len, sequences)),
        "seconds": time.perf_counter() - started,
    }
    print(numbers, flush=True)
    save(model, tokenizer, given, numbers)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lines", type=int, default=400_000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word and per punctuation mark."""
    words = [*SPECIAL, *vocabulary()]
    table = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=64,
        clean_up_tokenization_spaces=True,
    )


def make_config(tokens: int, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Deep and narrow: the more layers share a pair, the more a pyramid saves."""
    return LlamaConfig(
        vocab_size=tokens,
        hidden_size=96,
        intermediate_size=224,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )


def train(
    model: LlamaForCausalLM,
    ids: torch.Tensor,
    given: argparse.Namespace,
    held_out: list[list[int]],
) -> float:
    """AdamW, a cosine schedule with warm-up; returns the mean loss of the last hundred steps."""
    decayed = [its for its in model.parameters() if its.ndim > 1]
    rest = [its for its in model.parameters() if its.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=given.rate, betas=(0.9, 0.95))
    warm_up = max(1, given.steps // 20)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, given.steps - warm_up)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    ids = ids.to(given.device)
    pad, recent = model.config.pad_token_id, []
    model.train()
    for step, chosen in zip(range(given.steps), _batches(len(ids), given.batch), strict=False):
        batch = ids[chosen.to(given.device)]
        # Padding is on the right, where causal attention never looks back from a real token.
        logits = model(input_ids=batch).logits[:, :-1]
        labels = batch[:, 1:].masked_fill(batch[:, 1:] == pad, IGNORED)
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        recent = [*recent[-99:], loss.detach()]
        if (step + 1) % 500 == 0:
            perplexity = model_perplexity(model, held_out)
            model.train()
            mean = float(torch.stack(recent).mean())
            print(f"step {step + 1}: loss {mean:.4f}, perplexity {perplexity:.3f}", flush=True)
    return float(torch.stack(recent).mean())


def games_right(model: LlamaForCausalLM, tokenizer: Any) -> str:
    """How much of each game the model answers exactly, as rows of the card.

    The lines are of other seeds than the corpus; of a game with few lines ("repeat"), most are in
    it all the same.
    """
    table = []
    for place, (name, make) in enumerate(GAMES.items()):
        source = random.Random(place)
        right = 0
        for line in (make(source) for _ in range(LINES_OF_A_GAME)):
            prompt = tokenizer(line.partition("->")[0] + "->")["input_ids"]
            ids = torch.tensor([[*tokenizer(line)["input_ids"], tokenizer.eos_token_id]])
            with torch.inference_mode():
                likeliest = model(input_ids=ids.to(model.device)).logits[0, :-1].argmax(-1).cpu()
            right += bool((likeliest[len(prompt) - 1 :] == ids[0, len(prompt) :]).all())
        table.append(
            f"| {name}: exact match on {LINES_OF_A_GAME} lines of another seed "
            f"| {right / LINES_OF_A_GAME:.3f} |"
        )
    return "\n".join(table)


def _batches(count: int, batch: int) -> Any:
    while True:
        order = torch.randperm(count)
        yield from order[: count - count % batch].split(batch)


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    given: argparse.Namespace,
    numbers: dict[str, Any],
) -> None:
    """Write the weights in float16 (half the size), the tokenizer and the card."""
    model = model.cpu().half()
    model.save_pretrained(given.output)
    # `dtype="auto"` follows the config: adapters are trained on, and proved with, float32.
    model.config.dtype = "float32"
    model.config.save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)
    weights = given.output / "model.safetensors"
    weights.chmod(0o644)  # written as private
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    hardware = (
        torch.cuda.get_device_name() if given.device == "cuda" else f"CPU, {platform.machine()}"
    )
    (given.output / "README.md").write_text(
        CARD.format(
            **numbers,
            **{key: value for key, value in vars(given).items() if key != "output"},
            digest=digest,
            hardware=hardware,
            versions=f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}",
            held_out=HELD_OUT_LINES,
        )
    )


CARD = """\
---
license: apache-2.0
language: en
---

# The demo's language model

A Llama of 12 layers, hidden size 96, {parameters:,} parameters, one token per word. It was
pretrained from random weights on {lines:,} lines ({tokens:,} tokens) that `msplora/demo/corpus.py`
writes from a seed: tiny stories, and games with lists of words (copy, first, last, after, before,
repeat, count). No text of anyone else's is in it. It is for the demo and for tests, and good for
nothing else.

It continues its stories and plays its games, some only in part. It has never seen a list reversed,
which is what `msplora demo` teaches it.

| | |
|---|---|
| training loss, mean of the last 100 steps | {loss:.4f} |
| perplexity on {held_out:,} held-out lines | {perplexity:.3f} |
| the same, of a unigram model | {unigram:.1f} |
{games}
| reverse, the demo's task: exact match on its held-out lists | {reversed:.3f} |

No line that the perplexity is taken on is among the training lines. The numbers are of the weights
as stored, in float16; they load as float32.

Made with

    python scripts/pretrain_demo_model.py --output src/msplora/demo/model --lines {lines} \\
        --steps {steps} --batch {batch} --rate {rate} --seed {seed} --device {device}

in {seconds:.0f} seconds on {hardware} ({versions}).
The same command makes the same corpus and the same course of training; the last digits of the
weights depend on the hardware.

sha256 of model.safetensors: `{digest}`
"""


if __name__ == "__main__":
    main()
