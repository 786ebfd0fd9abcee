"""A real GPT-2 that sorts six letters in ascending order learns to sort them in descending order.

    python benchmarks/sort_descending.py --model MODEL_FOLDER --output results.json

The model (GPT-2 with Conv1D layers, no tokenizer) continues six symbols 0 to 2 with the same six,
sorted. 500 of the 729 inputs train, the other 229 are held out; exact match counts whole answers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import msplora
from msplora.bench.provenance import provenance

LENGTH, SYMBOLS, TRAINING_INPUTS = 6, 3, 500


def main() -> None:
    """Adapt with both methods and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    inputs = list(itertools.product(range(SYMBOLS), repeat=LENGTH))
    random.Random(0).shuffle(inputs)
    train, held_out = inputs[:TRAINING_INPUTS], inputs[TRAINING_INPUTS:]

    base = GPT2LMHeadModel.from_pretrained(given.model)
    before = {
        "ascending": exact_match(base, held_out, descending=False),
        "descending": exact_match(base, held_out, descending=True),
    }
    print("before:", before)
    rows = []
    for name, rate in itertools.product(("lora", "pyramid"), given.rates):
        row = adapt(given.model, name, rate, given.epochs, train, held_out)
        rows.append(row)
        print(row)
    content = {"before": before, "runs": rows, "epochs": given.epochs, **provenance()}
    given.output.write_text(json.dumps(content, indent=2) + "\n")


def adapt(
    source: str, name: str, rate: float, epochs: int, train: list[Any], held_out: list[Any]
) -> dict[str, Any]:
    """Train one adapter; measure it live, reloaded and, for a pyramid, converted."""
    set_seed(0)
    targets = ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    options: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": targets}
    config = (
        LoraConfig(fan_in_fan_out=True, **options)
        if name == "lora"
        else msplora.MSPLoraConfig(**options)
    )
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(source), config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=f"{folder}/trainer",
            num_train_epochs=epochs,
            per_device_train_batch_size=50,
            learning_rate=rate,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=[example(its) for its in train]).train()
        model.save_pretrained(f"{folder}/adapter")
        row = {
            "name": name,
            "learning_rate": rate,
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "descending": exact_match(model.eval(), held_out, descending=True),
        }
        row["reloaded"] = exact_match(load(source, f"{folder}/adapter"), held_out, True)
        if name == "pyramid":
            result = msplora.to_lora(f"{folder}/adapter", f"{folder}/lora")
            assert result.comparison is not None
            row["largest_logit_difference"] = result.comparison.difference
            row["converted"] = exact_match(load(source, f"{folder}/lora"), held_out, True)
    return row


def load(source: str, adapter: str) -> PeftModel:
    """The base with a saved adapter."""
    return PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(source), adapter).eval()


def example(symbols: tuple[int, ...]) -> dict[str, list[int]]:
    """One row: the input, its answer, and a loss on the answer only.

    The model has as many positions as input and answer less one, so that the last symbol is
    predicted but never read; the labels are therefore given as shifted.
    """
    ids = [*symbols, *sorted(symbols, reverse=True)]
    following = [-100] * (LENGTH - 1) + ids[LENGTH:]
    return {"input_ids": ids[:-1], "labels": following, "shift_labels": following}


def exact_match(model: Any, inputs: list[tuple[int, ...]], descending: bool) -> float:
    """The share of inputs whose greedy answer is right in every symbol."""
    ids = torch.tensor(inputs)
    with torch.no_grad():
        for _ in range(LENGTH):
            following = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
    expected = torch.tensor([sorted(its, reverse=descending) for its in inputs])
    return float((ids[:, LENGTH:] == expected).all(dim=1).float().mean())


if __name__ == "__main__":
    main()
