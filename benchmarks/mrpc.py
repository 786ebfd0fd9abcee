"""MRPC on a small real encoder: LoRA, the paper's pyramid, and the pyramid with one alpha split.

    python benchmarks/mrpc.py --model MODEL_FOLDER --data FOLDER_WITH_TRAIN_AND_DEV_TSV \
        --rates 3e-4 1e-3 --seeds 0 --results benchmarks/results/mrpc.jsonl

Every method gets the same learning rates, seeds, batch and epochs; a row of the result is one run.
Existing rows are kept and their runs skipped, so an interrupted sweep continues.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

from rich.console import Console

from msplora.bench.provenance import provenance
from msplora.train.run import train_run
from msplora.train.settings import Settings

METHODS = {
    "lora": {"method": "lora"},
    "pyramid": {"method": "msplora"},
    "pyramid, split alpha": {"method": "msplora", "split_alpha": True},
}


def main() -> None:
    """Run what is missing of the sweep and append a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--results", type=Path, required=True)
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.results.open()] if given.results.exists() else []
    told = (given.epochs, given.dtype)
    done = {
        (row["name"], row["learning_rate"], row["seed"])
        for row in rows
        if (row["epochs"], row["dtype"]) == told
    }
    for seed, rate, name in itertools.product(given.seeds, given.rates, given.methods):
        if (name, rate, seed) in done:
            continue
        row = one_run(given, name, rate, seed)
        given.results.parent.mkdir(parents=True, exist_ok=True)
        with given.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:22} lr {rate:g} seed {seed}: best accuracy {row['accuracy']:.4f}")


def one_run(given: argparse.Namespace, name: str, rate: float, seed: int) -> dict:
    """Train once and return its row."""
    method = dict(METHODS[name])
    adapter = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}
    if method.pop("split_alpha", False):
        adapter["split_alpha"] = True
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.model_validate(
            {
                **method,
                "task": "classification",
                "model": given.model,
                "output": f"{folder}/run",
                "seed": seed,
                "dtype": given.dtype,
                "data": {"glue": "mrpc", "path": given.data},
                "adapter": adapter,
                "training": {
                    "epochs": given.epochs,
                    "batch_size": 32,
                    "learning_rate": rate,
                },
            }
        )
        start = time.perf_counter()
        run = train_run(settings, console=Console(quiet=True))
        seconds = time.perf_counter() - start
        metrics = json.loads((run / "metrics.json").read_text())
        plan = json.loads((run / "plan.json").read_text())
    return {
        "name": name,
        "learning_rate": rate,
        "seed": seed,
        "accuracy": metrics["best"]["accuracy"],
        "f1": metrics["best"]["f1"],
        "epoch": metrics["best"]["epoch"],
        "by_epoch": [its["accuracy"] for its in metrics["evaluations"]],
        "trainable": plan.get("trainable"),
        "epochs": given.epochs,
        "batch_size": 32,
        "dtype": given.dtype,
        "seconds": round(seconds, 1),
        **provenance(),
    }


if __name__ == "__main__":
    main()
