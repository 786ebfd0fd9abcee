"""Every file in examples/ is whole, and trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from msplora.cli.app import app
from msplora.train.settings_file import read_settings
from tiny_saved import save_encoder, save_language_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FILES = sorted(file.name for file in EXAMPLES.glob("*.yaml"))
REVIEWS = ("review\tsentiment", *["Good.\tpositive", "Bad.\tnegative"] * 8)
PAIRS = (
    "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    *["1\t1\t2\tIt is.\tIt is so.", "0\t3\t4\tIt is.\tNo."] * 8,
)
CHAT = {
    "messages": [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi!"},
    ]
}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds what the examples name: tiny models and tiny data."""
    save_language_model(tmp_path / "Qwen/Qwen3-0.6B")
    save_language_model(tmp_path / "HuggingFaceTB/SmolLM2-135M-Instruct", chats=True)
    save_encoder(tmp_path / "FacebookAI/roberta-base")
    (tmp_path / "glue/MRPC").mkdir(parents=True)
    row = json.dumps({"prompt": "One, two,", "completion": " three."})
    contents = {
        "train.jsonl": [row] * 8,
        "chats.jsonl": [json.dumps(CHAT)] * 8,
        "reviews.tsv": REVIEWS,
        "glue/MRPC/train.tsv": PAIRS,
        "glue/MRPC/dev.tsv": PAIRS,
    }
    for name, lines in contents.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_are_these() -> None:
    assert FILES == ["chat.yaml", "classification.yaml", "sft.yaml"]


@pytest.mark.parametrize("name", FILES)
def test_an_example_is_read(name: str) -> None:
    assert read_settings(EXAMPLES / name).method == "msplora"


@pytest.mark.parametrize("name", FILES)
def test_an_example_trains(name: str, workspace: Path) -> None:
    changes = ("training.max_steps=2", "training.batch_size=2", "training.gradient_accumulation=1")
    flags = [word for change in changes for word in ("--set", change)]
    app(
        ["train", str(EXAMPLES / name), *flags, "--output", "run"],
        standalone_mode=False,
    )
    metrics = json.loads((workspace / "run/metrics.json").read_text())
    assert metrics["best"]["step"] > 0
    history = json.loads((workspace / "run/log_history.json").read_text())
    # Gradients reach the pairs: with checkpointing, they would not without the input's own.
    assert all(entry["grad_norm"] > 0 for entry in history if "grad_norm" in entry)
