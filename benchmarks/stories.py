"""A real Llama of 260K parameters learns instructions, or plain text: LoRA against the pyramid.

    python benchmarks/stories.py --model MODEL_FOLDER --data FILE --epochs 3 \
        --rates 1e-3 3e-3 1e-2 --seeds 0 1 2 --output benchmarks/results/stories.jsonl

Every method gets the same rows, learning rates, seeds, batch and epochs; a row of the result is one
run: the loss per token on held-out rows before and after training, of the reloaded adapter and of
the plain LoRA it was converted to. Existing rows are kept and their runs skipped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

import msplora
from msplora.bench.provenance import fingerprint, provenance, short
from msplora.train.data_split import hold_out
from msplora.train.evaluation import evaluate_run
from msplora.train.run import train_run
from msplora.train.settings import Settings

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "adapter": {"r": 8}},
    # At 5 layers exactly as many parameters as the pyramid.
    "lora, r = 6": {"method": "lora", "adapter": {"r": 6}},
    "pyramid": {"method": "msplora", "adapter": {"r": 8}},
    "pyramid, split alpha": {"method": "msplora", "adapter": {"r": 8, "split_alpha": True}},
}
BATCH_SIZE = 8


def main() -> None:
    """Run what is missing of the sweep and append a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="alpaca .json, or .txt")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.output.open()] if given.output.exists() else []
    told = (given.data.name, given.epochs, short(given.model))
    done = {
        (row["name"], row["learning_rate"], row["seed"])
        for row in rows
        if (row["data"], row["epochs"], row["model"]) == told
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    for seed, rate, name in itertools.product(given.seeds, given.rates, given.methods):
        if (name, rate, seed) in done:
            continue
        row = one_run(given, name, rate, seed)
        with given.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:22} lr {rate:g} seed {seed}: {row['before']:.4f} -> {row['after']:.4f}")


def one_run(given: argparse.Namespace, name: str, rate: float, seed: int) -> dict[str, Any]:
    """Train once, measure the adapter live, reloaded and converted, and return the row."""
    method = METHODS[name]
    with tempfile.TemporaryDirectory() as text_folder:
        folder = Path(text_folder)
        settings = Settings.model_validate(
            {
                "method": method["method"],
                "adapter": {"target_modules": ["q_proj", "v_proj"], **method["adapter"]},
                "task": "sft",
                "model": given.model,
                "output": str(folder / "run"),
                "seed": seed,
                "data": fixed_split(given.data, folder),
                "training": {
                    "epochs": given.epochs,
                    "batch_size": BATCH_SIZE,
                    "learning_rate": rate,
                },
            }
        )
        start = time.perf_counter()
        run = train_run(settings, console=Console(quiet=True))
        seconds = time.perf_counter() - start
        metrics = json.loads((run / "metrics.json").read_text())
        reloaded = evaluate_run(run)
        row = {
            "model": short(given.model),
            "model_sha256": fingerprint(Path(given.model) / "model.safetensors"),
            "data": given.data.name,
            "data_sha256": fingerprint(given.data),
            "name": name,
            "learning_rate": rate,
            "seed": seed,
            "epochs": given.epochs,
            "batch_size": BATCH_SIZE,
            "trainable": metrics["trainable"],
            "held_out_rows": reloaded["rows"],
            "held_out_tokens": reloaded["tokens"],
            "before": metrics["before"]["loss"],
            "by_epoch": [its["loss"] for its in metrics["evaluations"]],
            "after": metrics["best"]["loss"],
            "reloaded": reloaded["loss"],
        }
        if method["method"] == "msplora":
            row |= converted(run, folder / "lora")
    return {**row, "seconds": round(seconds, 1), **provenance()}


def fixed_split(data: Path, folder: Path) -> dict[str, str]:
    """The same held-out rows whatever the seed of the run; of plain text, its end is held out."""
    if data.suffix == ".txt":
        return {"train": str(data)}
    train, held_out = hold_out(json.loads(data.read_text()), 0.1, seed=0)
    files = {"train": folder / "train.json", "validation": folder / "validation.json"}
    for file, rows in zip(files.values(), (train, held_out), strict=True):
        file.write_text(json.dumps(rows))
    return {key: str(file) for key, file in files.items()}


def converted(run: Path, lora: Path) -> dict[str, float]:
    """The held-out loss of the plain LoRA, and its logits' difference on the conversion's probe."""
    result = msplora.to_lora(run, lora)
    assert result.comparison is not None
    # With the run's record beside it, the LoRA is measured on the very same rows.
    shutil.copy(run / "adapter/task.json", lora)
    return {
        "converted": evaluate_run(lora)["loss"],
        "largest_logit_difference": result.comparison.difference,
        "largest_logit_effect": result.comparison.effect,
    }


if __name__ == "__main__":
    main()
