"""Other ways to share than the pyramid's, on a real Llama of 260K parameters, at one size.

    python benchmarks/attempts.py --model stories260K/hf --data instruction-data.json \
        --output benchmarks/results/attempts.jsonl

What is tried here is not part of the library: layers made for the trial, on the library's own data,
optimiser and evaluation. Each way chooses its learning rate with the first seed, like the methods
of a bake-off, and then runs with every seed; a row of the result is one run. Existing rows are kept
and their runs skipped. docs/decisions.md says what came of it.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from msplora.bench.provenance import fingerprint, provenance
from msplora.train.quiet import quiet_libraries
from msplora.train.run import prepare_job, with_absolute_paths
from msplora.train.settings import Settings

ALPHA = 16


@dataclass(frozen=True)
class Level:
    """Pairs of one rank: how many groups of layers have an A, and a B, of their own (0: each)."""

    rank: int
    a_groups: int
    b_groups: int
    gated: bool = False
    """A vector per layer, of ones at first, between A and B."""


@dataclass(frozen=True)
class Way:
    """Levels, and how they are made and trained."""

    levels: tuple[Level, ...]
    orthogonal: bool = False
    """The A's that meet in a layer start with orthogonal rows."""
    penalty: float = 0.0
    """Weight of the squared cosines between the rows of different levels' A in a layer."""


def pyramid(*ranks: int, gated: bool = False) -> tuple[Level, ...]:
    """Global, mid in three groups, local."""
    return tuple(
        Level(rank, groups, groups, gated and groups != 0)
        for rank, groups in zip(ranks, (1, 3, 0), strict=True)
    )


WAYS = {
    "LoRA, r = 6": Way((Level(6, 0, 0),)),
    "pyramid 8, 4, 2": Way(pyramid(8, 4, 2)),
    "pyramid, shared pairs gated per layer": Way(pyramid(8, 4, 2, gated=True)),
    "pyramid, orthogonal at the start": Way(pyramid(8, 4, 2), orthogonal=True),
    "pyramid, levels held apart (0.1)": Way(pyramid(8, 4, 2), orthogonal=True, penalty=0.1),
    "A shared by all, B per layer, r = 11": Way((Level(11, 1, 0),)),
    "B shared by all, A per layer, r = 9": Way((Level(9, 0, 1),)),
    "A shared by all and by groups, B per layer, r = 5 + 5": Way((Level(5, 1, 0), Level(5, 3, 0))),
    "one pair for all, r = 30": Way((Level(30, 1, 1),)),
    "one pair for all, gated per layer, r = 28": Way((Level(28, 1, 1, gated=True),)),
    "global 10, local 4": Way((Level(10, 1, 1), Level(4, 0, 0))),
    "global 10 gated, local 4": Way((Level(10, 1, 1, gated=True), Level(4, 0, 0))),
    "A shared r = 5, local r = 3": Way((Level(5, 1, 0), Level(3, 0, 0))),
}


class Site(nn.Module):
    """A frozen layer and what its levels add: ``y = W x + Σ s B (g ∘ (A x))``."""

    def __init__(self, base: nn.Module, parts: Sequence[tuple[Any, Any, Any, float]]) -> None:
        super().__init__()
        self.base = base
        self.scales = [scale for *_, scale in parts]
        self.a = nn.ParameterList(a for a, *_ in parts)
        self.b = nn.ParameterList(b for _, b, *_ in parts)
        self.gates = nn.ParameterDict(
            {str(place): gate for place, (_, _, gate, _) in enumerate(parts) if gate is not None}
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for place, (a_RI, b_OR, scale) in enumerate(zip(self.a, self.b, self.scales, strict=True)):
            inner = x @ a_RI.mT
            if str(place) in self.gates:
                inner = inner * self.gates[str(place)]
            y = y + scale * (inner @ b_OR.mT)
        return y


def put_on(model: nn.Module, way: Way) -> list[Site]:
    """Replace the LoRA layers of a model; only what the way adds trains."""
    model.requires_grad_(False)
    layers = [(path, its) for path, its in model.named_modules() if isinstance(its, LoraLayer)]
    kinds: dict[str, list[tuple[str, Any]]] = {}
    for path, layer in layers:
        kinds.setdefault(path.rpartition(".")[2], []).append((path, layer))
    sites = []
    for kind in kinds.values():
        made: dict[tuple[int, str, int], nn.Parameter] = {}
        for place, (path, layer) in enumerate(kind):
            base = layer.get_base_layer()
            parts = list(_parts(way, made, place, len(kind), base.in_features, base.out_features))
            parent, _, name = path.rpartition(".")
            site = Site(base, parts)
            setattr(model.get_submodule(parent), name, site)
            sites.append(site)
    return sites


def _parts(
    way: Way, made: dict[Any, nn.Parameter], place: int, layers: int, width: int, height: int
) -> Iterator[tuple[Any, Any, Any, float]]:
    rows = sum(level.rank for level in way.levels)
    basis = torch.linalg.qr(torch.randn(width, max(rows, 1)))[0].mT if rows <= width else None
    start = 0
    for number, level in enumerate(way.levels):
        a_key = number, "a", _group(level.a_groups, place, layers)
        b_key = number, "b", _group(level.b_groups, place, layers)
        if a_key not in made:
            a_RI = torch.empty(level.rank, width)
            nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5))
            if way.orthogonal and basis is not None:
                # As long as LoRA's rows are on average.
                a_RI = basis[start : start + level.rank] * math.sqrt(1 / 3)
            made[a_key] = nn.Parameter(a_RI)
        if b_key not in made:
            made[b_key] = nn.Parameter(torch.zeros(height, level.rank))
        gate = nn.Parameter(torch.ones(level.rank)) if level.gated else None
        # One alpha, split between the levels: all ways step alike at one rate.
        yield made[a_key], made[b_key], gate, ALPHA / len(way.levels) / level.rank
        start += level.rank


def _group(groups: int, place: int, layers: int) -> int:
    """The group of a layer: the first groups are the larger ones, as in a pyramid."""
    if groups == 0:
        return place
    size, larger = divmod(layers, groups)
    ends = [sum(size + (group < larger) for group in range(its + 1)) for its in range(groups)]
    return next(group for group, end in enumerate(ends) if place < end)


def apart(sites: Sequence[Site]) -> Tensor:
    """The mean squared cosine between rows of different levels' A in a layer."""
    found = []
    for site in sites:
        unit = [nn.functional.normalize(a, dim=1) for a in site.a]
        found += [(one @ two.mT).square().mean() for one, two in _pairs(unit)]
    return torch.stack(found).mean()


def _pairs(values: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for place, one in enumerate(values):
        for two in values[place + 1 :]:
            yield one, two


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
        sites = put_on(job.adapted.model, way)
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
    return {"loss": min(losses), "by_epoch": losses, "trainable": numbers}


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
    rows = [json.loads(line) for line in given.output.open()] if given.output.exists() else []

    def loss(name: str, rate: float, seed: int) -> float:
        for row in rows:
            if (row["way"], row["learning_rate"], row["seed"]) == (name, rate, seed):
                return row["loss"]
        row = {"way": name, "learning_rate": rate, "seed": seed}
        row |= one_run(given, WAYS[name], rate, seed)
        rows.append(row | about)
        with given.output.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        return row["loss"]

    for name in given.ways:
        best = min(given.rates, key=lambda rate, name=name: loss(name, rate, given.seeds[0]))
        found = [loss(name, best, seed) for seed in given.seeds]
        size = next(row["trainable"] for row in rows if row["way"] == name)
        spread = stdev(found) if len(found) > 1 else 0.0
        print(f"{name:54} {size:6,} {best:6g} {mean(found):.4f} ± {spread:.4f}", flush=True)


if __name__ == "__main__":
    main()
