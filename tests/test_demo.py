"""The demo: its corpus, its pretrained model, its task, and what a run leaves behind."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from msplora.cli.app import app
from msplora.demo import MODEL_FOLDER
from msplora.demo.corpus import GAMES, LISTED, lines, vocabulary
from msplora.demo.perplexity import encode, model_perplexity, padded, unigram_perplexity
from msplora.demo.run import MARKER, run_demo
from msplora.demo.task import HELD_OUT, Example, exact_match, rows, split, write
from msplora.errors import MSPLoraError
from msplora.train.saved_run import open_run

CARD = (MODEL_FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype="auto")


def on_card(name: str) -> float:
    found = re.search(rf"^\| {re.escape(name)}.*\| ([\d.]+) \|$", CARD, flags=re.MULTILINE)
    assert found is not None, name
    return float(found.group(1))


# The corpus


def test_the_same_seed_gives_the_same_corpus() -> None:
    first, again, other = (list(itertools.islice(lines(seed), 50)) for seed in (1, 1, 2))
    assert first == again != other


def test_every_line_is_short_and_in_the_vocabulary() -> None:
    known = set(vocabulary())
    for line in itertools.islice(lines(3), 5000):
        words = line.split()
        assert len(words) <= 32
        assert known.issuperset(words), line


def test_no_line_of_the_corpus_reverses_a_list() -> None:
    for line in itertools.islice(lines(4), 20000):
        assert not line.startswith("reverse")
        question, arrow, answer = line.partition(" -> ")
        if arrow and not question.startswith("count"):
            words, reply = question.partition(" : ")[2].split(), answer.split()
            assert len(words) == 1 or len(reply) == 1 or reply == words


# The task


def test_no_held_out_question_is_trained_on_and_they_never_change() -> None:
    training, held_out = split(3000)
    assert not {its.words for its in training} & {its.words for its in held_out}
    assert len({its.words for its in [*training, *held_out]}) == 3000 + HELD_OUT
    assert split(10)[1] == held_out


def test_the_loss_counts_the_answer_and_the_end(tokenizer: Any) -> None:
    (row,) = rows([Example(("cat", "ball", "mill", "owl", "cup"))], tokenizer)
    assert tokenizer.decode(row["input_ids"]).startswith("reverse : cat ball mill owl cup ->")
    counted = [its for its in row["labels"] if its != -100]
    assert tokenizer.decode(counted).split() == ["cup", "owl", "mill", "ball", "cat", "<eos>"]
    assert row["labels"][-len(counted) :] == row["input_ids"][-len(counted) :]
    assert len({len(its["input_ids"]) for its in rows(split(50)[0], tokenizer)}) == 1


def test_exact_match_is_what_generation_would_get(model: Any, tokenizer: Any) -> None:
    """On long copies, of which the model gets some right and some wrong."""
    source = random.Random(7)
    encoded, written, count = [], 0, 30
    for _ in range(count):
        answer = " ".join(source.sample(LISTED, 8))
        prompt = tokenizer(f"copy : {answer} ->")["input_ids"]
        end = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        encoded.append({"input_ids": prompt + end, "labels": [-100] * len(prompt) + end})
        written += write(model, tokenizer, f"copy : {answer} ->") == answer
    assert 0 < written < count
    assert exact_match(model, encoded) == written / count


# The pretrained model


def test_the_model_is_small_and_its_card_is_its_own() -> None:
    weights = (MODEL_FOLDER / "model.safetensors").read_bytes()
    assert len(weights) < 6e6
    assert hashlib.sha256(weights).hexdigest() in CARD
    script = Path(__file__).resolve().parents[1] / "scripts/pretrain_demo_model.py"
    assert f"python scripts/{script.name}" in CARD
    for option, value in re.findall(r"--(lines|steps|batch|rate|seed) ([\d.]+)", CARD):
        default = re.search(rf'"--{option}", type=\w+, default=([\d_.e-]+)\)', script.read_text())
        assert default is not None
        assert float(default.group(1)) == float(value)


def test_the_model_has_learnt_the_corpus(model: Any, tokenizer: Any) -> None:
    held_out = encode(itertools.islice(lines(12345), 300), tokenizer)
    training = encode(itertools.islice(lines(54321), 3000), tokenizer)
    its = model_perplexity(model, held_out)
    # These lines are not sifted, so that some were in the corpus.
    assert its < 1.05 * on_card("perplexity")
    counting = unigram_perplexity(training, held_out, len(tokenizer))
    assert counting == pytest.approx(on_card("the same, of a unigram model"), rel=0.1)
    assert its < counting / 10


@pytest.mark.slow
@pytest.mark.parametrize("name", GAMES)
def test_the_model_plays_its_games_as_its_card_says(name: str, model: Any, tokenizer: Any) -> None:
    source = random.Random(99)
    right, count = 0, 60
    for line in (GAMES[name](source) for _ in range(count)):
        question, _, answer = line.partition("-> ")
        right += write(model, tokenizer, f"{question}->") == answer
    assert right / count == pytest.approx(on_card(f"{name}:"), abs=0.2)


def test_the_model_cannot_reverse_a_list(model: Any, tokenizer: Any) -> None:
    assert exact_match(model, rows(split(0)[1], tokenizer)) <= 0.01
    assert on_card("reverse") <= 0.01


def test_perplexity_by_hand(model: Any, tokenizer: Any) -> None:
    sequences = encode(["copy : cat -> cat", "anna had a cow ."], tokenizer)
    logits = model(input_ids=padded(sequences, model.config.pad_token_id)).logits
    losses = [
        -float(logits[row, place].log_softmax(-1)[ids[place + 1]])
        for row, ids in enumerate(sequences)
        for place in range(len(ids) - 1)
    ]
    expected = torch.tensor(losses).mean().exp()
    assert model_perplexity(model, sequences) == pytest.approx(float(expected), rel=1e-4)
    assert unigram_perplexity([[0, 1, 1]], [[0, 1]], 3) == pytest.approx(5 / 3)


# A run

FILES = (
    "README.md",
    "comparison.png",
    "comparison.json",
    "msplora.yaml",
    "lora.yaml",
    "train.jsonl",
    "held_out.jsonl",
    "msplora/plan.txt",
    "msplora/README.md",
    "msplora/loss.png",
    "msplora/adapter/adapter_model.safetensors",
    "lora/adapter/adapter_model.safetensors",
    "converted-lora/adapter_model.safetensors",
)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    content = json.loads((folder / "comparison.json").read_text())
    return {row["name"]: row for row in content["models"]}


@pytest.mark.thorough
def test_a_demo_leaves_everything_and_replaces_only_a_demo(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    (out / "of-an-earlier-demo.txt").touch()
    (out / MARKER).touch()
    console = Console(record=True, width=100, file=io.StringIO())
    run_demo(out, max_steps=2, console=console)
    text = console.export_text()
    for file in FILES:
        assert (out / file).stat().st_size > 0, file
    Image.open(out / "comparison.png").verify()
    found = results(out)
    assert list(found) == ["base model", "LoRA", "pyramid", "pyramid as LoRA"]
    assert found["pyramid"]["trainable"] < 0.46 * found["LoRA"]["trainable"]
    assert found["pyramid as LoRA"]["loss"] == pytest.approx(found["pyramid"]["loss"], rel=1e-5)
    for row in found.values():
        assert f"{row['loss']:.4f}" in text
        assert f"{row['loss']:.4f}" in (out / "README.md").read_text()
    # What the terminal says to look at is there.
    for name in re.findall(
        r"^  ([\w./-]+?)/? {2,}\w", text.partition("\nDone in")[2], re.MULTILINE
    ):
        assert (out / name).exists(), name
    assert not (out / "of-an-earlier-demo.txt").exists()


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(MSPLoraError, match="not empty"):
        run_demo(tmp_path)
    with pytest.raises(MSPLoraError, match="is a file"):
        run_demo(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    done = CliRunner().invoke(app, ["demo", "--output", str(tmp_path)])
    assert done.exit_code != 0


@pytest.mark.thorough
def test_both_methods_learn_what_the_model_could_not_do(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    run_demo(out, console=Console(quiet=True))
    found = {name: row["exact_match"] for name, row in results(out).items()}
    assert found.pop("base model") <= 0.01
    assert min(found.values()) > 0.9
    run = open_run(out / "msplora")
    example = split(0)[1][10]
    assert write(run.model, run.base.tokenizer, example.prompt) == example.answer
