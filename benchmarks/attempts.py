"""Other ways to share than the pyramid's, on a real Llama of 260K parameters, at one size.

    python benchmarks/attempts.py --model stories260K/hf --data instruction-data.json \
        --output benchmarks/results/attempts

What is tried here is not part of the library: layers made for the trial, on the library's own data,
optimiser and evaluation. Each way chooses its learning rate with the first seed, like the methods
of a bake-off, also beyond the rates given where the best is at their end, and then runs with every
seed, the baseline first; a row of results.jsonl is one run, and report.md says how the ways stand.
Existing rows are kept and their runs skipped; rows of other data or another model are refused.
docs/decisions.md says what came of it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from ways import BASELINE, WAYS, Way, apart, cosines, put_on

from msplora.bakeoff.choosing import next_out
from msplora.bench.provenance import fingerprint, provenance
from msplora.train.quiet import quiet_libraries
from msplora.train.run import prepare_job, with_absolute_paths
from msplora.train.settings import Settings

FURTHER = 2
"""How often a rate beyond those given is tried."""


def first_gradients(trainer: Any, batches: int = 16) -> dict[str, Tensor]:
    """The gradient of each adapted weight, (O, I), summed over the first batches of training."""
    model = trainer.model
    weights = {
        path: its.get_base_layer().weight
        for path, its in model.named_modules()
        if isinstance(its, LoraLayer)
    }
    for weight in weights.values():
        weight.requires_grad_(True)
    model.eval()  # B = 0: what is measured is the base
    for batch in islice(trainer.get_train_dataloader(), batches):
        trainer.compute_loss(model, trainer._prepare_inputs(batch)).backward()
    model.train()
    found = {path: weight.grad for path, weight in weights.items()}
    for weight in weights.values():
        weight.grad = None
    return found


def one_run(given: argparse.Namespace, way: Way, rate: float, seed: int) -> dict[str, Any]:
    """Train once; the best of the epochs on the held-out rows."""
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        settings = Settings.model_validate(
            {
                "method": "lora",
                "model": given.model,
                "task": "sft",
                "output": f"{folder}/run",
                "seed": seed,
                "data": {
                    "train": str(given.data),
                    "validation_fraction": 0.1,
                    "max_length": 256,
                    "too_long": "truncate",
                },
                "adapter": {"target_modules": ["q_proj", "v_proj"]},
                "training": {"epochs": 3, "batch_size": 8, "learning_rate": rate},
            }
        )
        settings = with_absolute_paths(settings)
        transformers.set_seed(seed)
        job = prepare_job(settings)
        wants_gradients = "gradient" in (way.start, way.cuts)
        gradients = first_gradients(job.make_trainer(Path(folder))) if wants_gradients else {}
        transformers.set_seed(seed)
        sites = put_on(job.adapted.model, way, gradients)
        trainer = job.make_trainer(Path(folder))
        trainer.args.save_strategy = "no"  # PEFT would not know what to save
        trainer.args.load_best_model_at_end = False
        if way.penalty:
            usual = trainer.compute_loss

            def with_penalty(*arguments: Any, **more: Any) -> Any:
                loss = usual(*arguments, **more)
                return loss + way.penalty * apart(sites) if isinstance(loss, Tensor) else loss

            trainer.compute_loss = with_penalty
        transformers.set_seed(seed)
        trainer.train()
        losses = [its["eval_loss"] for its in trainer.state.log_history if "eval_loss" in its]
        numbers = sum(its.numel() for its in job.adapted.model.parameters() if its.requires_grad)
        found = {"loss": min(losses), "by_epoch": losses, "trainable": numbers}
        if len(way.levels) > 1:
            found["mean_squared_cosine"] = (
                torch.cat([cosines(site) for site in sites]).mean().item()
            )
    return found


def best_rate(
    given: Sequence[float], loss: Callable[[float], float], known: Iterable[float] = ()
) -> float:
    """The rate with the least loss, of those given and, where it is at their end, of the next ones
    out, as a bake-off looks for it. Those that are `known` from other rates given before count too,
    as they do in the table.
    """
    tried = {rate: loss(rate) for rate in (*given, *known)}
    for _ in range(FURTHER):
        best = least(tried)
        beyond = next_out(sorted(given), sorted(tried), best)
        if beyond is None:
            break
        tried[beyond] = loss(beyond)
    return least(tried)


def least(losses: Mapping[float, float]) -> float:
    """The rate of the least loss; of two alike the lower."""
    return min(losses, key=lambda rate: (losses[rate], rate))


def losses_with(rows: Sequence[dict[str, Any]], name: str, seed: int) -> dict[float, float]:
    """Rate -> loss of a way with a seed."""
    return {
        row["learning_rate"]: row["loss"]
        for row in rows
        if (row["way"], row["seed"]) == (name, seed)
    }


def weights_of(model: str) -> str:
    """The fingerprints of a model's weights, joined.

    Raises:
        SystemExit: the folder has none.
    """
    files = sorted([*Path(model).glob("*.safetensors"), *Path(model).glob("pytorch_model*.bin")])
    if not files:
        raise SystemExit(f"--model {model} is no folder with a model's weights: name one.")
    return "-".join(map(fingerprint, files))


def check_same(rows: Sequence[dict[str, Any]], about: dict[str, Any], file: Path) -> None:
    """Refuse to add to runs of other data or of another model. Rows that do not say which model,
    as the first ones do, are of this one.

    Raises:
        SystemExit: there are some.
    """
    for what in ("data", "model"):
        key = f"{what}_sha256"
        other = next((row[key] for row in rows if row.get(key, about[key]) != about[key]), None)
        if other is not None:
            raise SystemExit(
                f"{file} has runs of another {what} (SHA-256 {other}, and --{what} has "
                f"{about[key]}), which cannot be compared with new ones: give --{what} what they "
                f"are of, or another --output."
            )


def main() -> None:
    """Run what is missing, and print how the ways stand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-3, 1e-2, 2e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    about = provenance("cpu")  # before the results change what is tracked
    about |= {"data": given.data.name, "data_sha256": fingerprint(given.data)}
    about["model_sha256"] = weights_of(given.model)
    file = given.output / "results.jsonl"
    given.output.mkdir(parents=True, exist_ok=True)
    end_last_line(file)
    rows = read(file)
    check_same(rows, about, file)

    def loss(name: str, rate: float, seed: int) -> float:
        for row in rows:
            if (row["way"], row["learning_rate"], row["seed"]) == (name, rate, seed):
                return row["loss"]
        row = {"way": name, "learning_rate": rate, "seed": seed}
        row |= one_run(given, WAYS[name], rate, seed)
        rows.append(row | about)
        with file.open("a", encoding="utf-8") as results:
            results.write(json.dumps(rows[-1]) + "\n")
        return row["loss"]

    for name in dict.fromkeys([BASELINE, *given.ways]):
        known = losses_with(rows, name, given.seeds[0])
        rate = best_rate(
            given.rates, lambda rate, name=name: loss(name, rate, given.seeds[0]), known
        )
        for seed in given.seeds:
            loss(name, rate, seed)
        print(name, flush=True)
    # Other processes may have run other ways meanwhile.
    (given.output / "report.md").write_text(report(read(file)), encoding="utf-8")


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a result file that may not be there yet."""
    if not file.exists():
        return []
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"{file}: line {number} is half a row, of a run that was killed; it is left out.")
    return rows


def end_last_line(file: Path) -> None:
    """Have the next row begin on a line of its own, whatever a run that was killed has left."""
    if file.exists() and file.read_bytes()[-1:] not in (b"", b"\n"):
        with file.open("a", encoding="utf-8") as results:
            results.write("\n")


def report(rows: list[dict[str, Any]]) -> str:
    """The page that says how the ways stand."""
    return "\n".join(["# Ways to share", "", "## How they stand", "", *table(rows)]) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The ways by their mean, each at its best rate, beside the baseline where it has the seed."""
    found = {}
    for name in dict.fromkeys(row["way"] for row in rows):
        its = [row for row in rows if row["way"] == name]
        rate = least(losses_with(its, name, its[0]["seed"]))
        found[name] = {row["seed"]: row for row in its if row["learning_rate"] == rate}
    lines = [
        "| way | trainable | rate | loss | better than LoRA, r = 6 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    baseline = found.get(BASELINE, {})
    for name, by_seed in sorted(found.items(), key=lambda its: mean(_losses(its[1]))):
        losses, row = _losses(by_seed), next(iter(by_seed.values()))
        spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        ahead = [
            baseline[seed]["loss"] - its["loss"]
            for seed, its in by_seed.items()
            if seed in baseline and name != BASELINE
        ]
        against = f"{mean(ahead):+.4f} ({min(ahead):+.4f} to {max(ahead):+.4f})" if ahead else "–"
        lines.append(
            f"| {name} | {row['trainable']:,} | {row['learning_rate']:g} | "
            f"{mean(losses):.4f}{spread} | {against} |"
        )
    return lines


def _losses(by_seed: dict[int, dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in by_seed.values()]


if __name__ == "__main__":
    main()
