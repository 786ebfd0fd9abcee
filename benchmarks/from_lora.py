"""How well a pyramid copies a trained LoRA, beside a LoRA of lower rank and as many parameters.

    OMP_NUM_THREADS=1 python benchmarks/from_lora.py --model MODEL_FOLDER --data FILE \
        --output benchmarks/results/from-lora.jsonl

A real LoRA (r = 8) is trained on a part of the rows. Then it is copied: by the nearest pyramid
(`msplora.to_msplora`), and by the nearest LoRA of a lower rank, which is a pyramid of one level
with a pair for each layer (the truncated singular value decomposition of each). A row of the result
is one copy: the share of the LoRA's squared norm that it explains, and the loss per token on
held-out rows of the base, the LoRA and the copy. Existing rows are kept and their runs skipped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

import msplora
from msplora.bench.provenance import fingerprint, provenance, short
from msplora.train.data_split import hold_out
from msplora.train.run import train_run
from msplora.train.settings import Settings

TARGETS: dict[str, Any] = {"q_proj, v_proj": ["q_proj", "v_proj"], "all-linear": "all-linear"}
COPIES: dict[str, dict[str, list[int]]] = {
    "pyramid 8, 4, 2": {"ranks": [8, 4, 2]},
    "LoRA, r = 6": {"ranks": [6], "groups": [0]},
    "pyramid 4, 2, 1": {"ranks": [4, 2, 1]},
    "LoRA, r = 3": {"ranks": [3], "groups": [0]},
}
"""At five layers a pyramid has as many parameters as the LoRA after it."""


def main() -> None:
    """Train and copy what is missing, and append a row for each copy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="alpaca .json")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.output.open()] if given.output.exists() else []
    done = {(row["targets"], row["seed"]) for row in rows}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for targets in given.targets:
            if (targets, seed) not in done:
                found = copies(given, targets, seed)
                with given.output.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in found)


def copies(given: argparse.Namespace, targets: str, seed: int) -> list[dict[str, Any]]:
    """Train one LoRA, copy it in every way, and return a row for each copy."""
    with tempfile.TemporaryDirectory() as text_folder:
        folder = Path(text_folder)
        train, held_out = hold_out(json.loads(given.data.read_text()), 0.1, seed=0)
        files = {"train": folder / "train.json", "validation": folder / "validation.json"}
        for file, rows in zip(files.values(), (train, held_out), strict=True):
            file.write_text(json.dumps(rows))
        settings = Settings.model_validate(
            {
                "method": "lora",
                "adapter": {"target_modules": TARGETS[targets], "r": 8, "lora_alpha": 16},
                "task": "sft",
                "model": given.model,
                "output": str(folder / "run"),
                "seed": seed,
                "data": {name: str(file) for name, file in files.items()},
                "training": {
                    "epochs": given.epochs,
                    "batch_size": 8,
                    "learning_rate": given.rate,
                },
            }
        )
        run = train_run(settings, console=Console(quiet=True))
        metrics = json.loads((run / "metrics.json").read_text())
        found = []
        for name, shape in COPIES.items():
            start = time.perf_counter()
            copy = msplora.to_msplora(
                run, folder / name.replace(" ", ""), data=str(files["validation"]), **shape
            )
            assert copy.loss is not None
            row = {
                "model": short(given.model),
                "model_sha256": fingerprint(Path(given.model) / "model.safetensors"),
                "data": given.data.name,
                "data_sha256": fingerprint(given.data),
                "targets": targets,
                "seed": seed,
                "learning_rate": given.rate,
                "epochs": given.epochs,
                "name": name,
                "parameters": copy.parameters,
                "lora_parameters": copy.source_parameters,
                "explained": copy.explained,
                "least_explained": min(its.share for its in copy.sites),
                "sweeps": copy.sweeps,
                "converged": copy.converged,
                "base_loss": metrics["before"]["loss"],
                "lora_loss": copy.loss[0],
                "copy_loss": copy.loss[1],
                "seconds": round(time.perf_counter() - start, 1),
                **provenance(),
            }
            print(f"{targets:16} {name:16} {copy.explained:.1%} {copy.loss[1]:.4f}", flush=True)
            found.append(row)
    return found


if __name__ == "__main__":
    main()
