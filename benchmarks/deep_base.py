"""A Llama deeper than stories260K, trained from scratch on plain text: a base for bake-offs.

    python benchmarks/deep_base.py --like stories260K/hf --layers 12 \
        --text tinyshakespeare.txt wiki.valid.raw wiki.test.raw --output deep

No pretrained model of this size is deep, and what sharing between layers is worth depends on how
many there are. The model has the widths and the tokenizer of `--like`; OUTPUT/run/model is what
was trained, and a run that was interrupted goes on. What is left of the text at its end says how
far it came.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from msplora.train.checkpoints import write_whole
from msplora.train.run import train_run
from msplora.train.settings import Settings


def main() -> None:
    """Make the model and the text if they are not there, and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--like", required=True)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    start, text = given.output / "start", given.output / "text.txt"
    read = "\n".join(its.read_text(encoding="utf-8") for its in given.text)
    check_same(start, given.layers, text, read)
    # Both are written beside and renamed: a kill leaves no half of them to train on.
    if not start.exists():
        partial = given.output / "start.partial"
        shutil.rmtree(partial, ignore_errors=True)
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(given.like, num_hidden_layers=given.layers)
        AutoModelForCausalLM.from_config(config).save_pretrained(partial)
        AutoTokenizer.from_pretrained(given.like).save_pretrained(partial)
        partial.rename(start)
    if not text.exists():
        write_whole(text, read)
    train_run(
        Settings.model_validate(
            {
                "method": "full",
                "model": str(start),
                "task": "sft",
                "output": str(given.output / "run"),
                "data": {"train": str(text), "validation_fraction": 0.02, "max_length": 256},
                "training": {
                    "epochs": given.epochs,
                    "batch_size": 16,
                    "learning_rate": 3e-3,
                    "scheduler": "cosine",
                    "weight_decay": 0.1,
                },
            }
        ),
        resume="auto",
    )


def check_same(start: Path, layers: int, text: Path, read: str) -> None:
    """Refuse to go on with another model or text than the folder was begun with.

    Raises:
        SystemExit: it was.
    """
    there = AutoConfig.from_pretrained(start).num_hidden_layers if start.exists() else layers
    if there != layers:
        raise SystemExit(f"{start} has {there} layers, not {layers}: name another --output.")
    if text.exists() and text.read_text(encoding="utf-8") != read:
        raise SystemExit(f"{text} was made of another --text: name another --output.")


if __name__ == "__main__":
    main()
