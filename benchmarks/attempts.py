"""Other ways to share than the pyramid's, on a real Llama of 260K parameters, at one size.

    python benchmarks/attempts.py --model stories260K/hf --data instruction-data.json \
        --output benchmarks/results/attempts

What is tried here is not part of the library: layers made for the trial, on the library's own data,
optimiser and evaluation. Each way chooses its learning rate with the first seed, like the methods
of a bake-off, and then runs with every seed; a row of results.jsonl is one run, and report.md says
how the ways stand. Existing rows are kept and their runs skipped. docs/decisions.md says what came
of it.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
import transformers
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from msplora.bench.provenance import fingerprint, provenance
from msplora.train.quiet import quiet_libraries
from msplora.train.run import prepare_job, with_absolute_paths
from msplora.train.settings import Settings

ALPHA = 16
ROW = math.sqrt(1 / 3)
"""The length of a row of LoRA's A at the start, on average."""


@dataclass(frozen=True)
class Level:
    """Pairs of one rank: how many groups of layers have an A, and a B, of their own (0: each)."""

    rank: int
    a_groups: int
    b_groups: int
    between: Literal["", "number", "vector", "matrix"] = ""
    """What each layer has of its own between A and B: ones, or the identity, at first."""


@dataclass(frozen=True)
class Way:
    """Levels, and how they are made and trained."""

    levels: tuple[Level, ...]
    start: Literal["random", "orthogonal", "gradient"] = "random"
    """The rows of A: LoRA's; orthogonal to those of the other levels; or, level after level, where
    the first gradient of the layers that share them is largest, orthogonal to the levels above."""
    cuts: Literal["equal", "gradient"] = "equal"
    """Groups of layers next to each other: as large as each other, or of layers whose first
    gradients are alike."""
    penalty: float = 0.0
    """Weight of the squared cosines between the rows of different levels' A in a layer."""


def pyramid(*ranks: int, between: Any = "") -> tuple[Level, ...]:
    """Global, mid in three groups, local."""
    return tuple(
        Level(rank, groups, groups, between if groups else "")
        for rank, groups in zip(ranks, (1, 3, 0), strict=True)
    )


BASELINE = "LoRA, r = 6"
WAYS = {
    BASELINE: Way((Level(6, 0, 0),)),
    "pyramid 8, 4, 2": Way(pyramid(8, 4, 2)),
    "pyramid, shared pairs scaled per layer": Way(pyramid(8, 4, 2, between="number")),
    "pyramid, shared pairs gated per layer": Way(pyramid(8, 4, 2, between="vector")),
    "pyramid, shared pairs with a core per layer": Way(pyramid(6, 4, 2, between="matrix")),
    "pyramid, orthogonal at the start": Way(pyramid(8, 4, 2), start="orthogonal"),
    "pyramid, A from the gradient": Way(pyramid(8, 4, 2), start="gradient"),
    "LoRA, r = 6, A from the gradient": Way((Level(6, 0, 0),), start="gradient"),
    "pyramid, cut by the gradient": Way(pyramid(8, 4, 2), cuts="gradient"),
    "pyramid, levels held apart (0.1)": Way(pyramid(8, 4, 2), start="orthogonal", penalty=0.1),
    "A shared by all, B per layer, r = 11": Way((Level(11, 1, 0),)),
    "B shared by all, A per layer, r = 9": Way((Level(9, 0, 1),)),
    "A shared by all and by groups, B per layer, r = 5 + 4": Way((Level(5, 1, 0), Level(4, 3, 0))),
    "one pair for all, r = 30": Way((Level(30, 1, 1),)),
    "one pair for all, gated per layer, r = 28": Way((Level(28, 1, 1, "vector"),)),
    "one pair for all, a core per layer, r = 17": Way((Level(17, 1, 1, "matrix"),)),
    "global 10, local 4": Way((Level(10, 1, 1), Level(4, 0, 0))),
    "global 10 gated, local 4": Way((Level(10, 1, 1, "vector"), Level(4, 0, 0))),
    "A shared r = 5, local r = 3": Way((Level(5, 1, 0), Level(3, 0, 0))),
}


class Site(nn.Module):
    """A frozen layer and what its levels add: ``y = W x + Σ s B C A x``, C the layer's own."""

    def __init__(self, base: nn.Module, parts: Sequence[tuple[Any, Any, Any, float]]) -> None:
        super().__init__()
        self.base = base
        self.scales = [scale for *_, scale in parts]
        self.a = nn.ParameterList(a for a, *_ in parts)
        self.b = nn.ParameterList(b for _, b, *_ in parts)
        self.cores = nn.ParameterDict(
            {str(place): core for place, (_, _, core, _) in enumerate(parts) if core is not None}
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for place, (a_RI, b_OR, scale) in enumerate(zip(self.a, self.b, self.scales, strict=True)):
            inner = x @ a_RI.mT
            if str(place) in self.cores:
                core = self.cores[str(place)]
                inner = inner @ core.mT if core.dim() == 2 else inner * core
            y = y + scale * (inner @ b_OR.mT)
        return y


def put_on(model: nn.Module, way: Way, gradients: dict[str, Tensor]) -> list[Site]:
    """Replace the LoRA layers of a model; only what the way adds trains.

    `gradients`: of each layer's weight, (O, I), by its path; none where the way asks for none.
    """
    model.requires_grad_(False)
    kinds: dict[str, dict[str, Any]] = {}
    for path, its in model.named_modules():
        if isinstance(its, LoraLayer):
            kinds.setdefault(path.rpartition(".")[2], {})[path] = its.get_base_layer()
    sites = []
    for layers in kinds.values():
        slopes = [gradients[path] for path in layers] if gradients else None
        for (path, base), parts in zip(layers.items(), _parts(way, layers, slopes), strict=True):
            parent, _, name = path.rpartition(".")
            sites.append(Site(base, parts))
            setattr(model.get_submodule(parent), name, sites[-1])
    return sites


def _parts(
    way: Way, layers: dict[str, Any], slopes: Sequence[Tensor] | None
) -> list[list[tuple[Any, Any, Any, float]]]:
    """Of each layer of one kind: A, B, what is between and scale of each level."""
    base = next(iter(layers.values()))
    width, height, count = base.in_features, base.out_features, len(layers)
    found: list[list[tuple[Any, Any, Any, float]]] = [[] for _ in layers]
    rows = sum(level.rank for level in way.levels)
    orthogonal_RI = torch.linalg.qr(torch.randn(width, rows))[0].mT if rows <= width else None
    first = 0
    for level in way.levels:
        a_of, b_of = (
            _groups(groups, count, slopes if way.cuts == "gradient" else None)
            for groups in (level.a_groups, level.b_groups)
        )
        a_factors, b_factors = {}, {}
        for group in sorted(set(a_of)):
            its = [place for place in range(count) if a_of[place] == group]
            a_RI = torch.empty(level.rank, width)
            nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5))
            if way.start == "gradient" and slopes is not None:
                above = [a for place in its for a, *_ in found[place]]
                a_RI = ROW * _steepest(sum(slopes[place] for place in its), level.rank, above)
            elif way.start == "orthogonal" and orthogonal_RI is not None:
                a_RI = ROW * orthogonal_RI[first : first + level.rank]
            a_factors[group] = nn.Parameter(a_RI)
        for group in set(b_of):
            b_factors[group] = nn.Parameter(torch.zeros(height, level.rank))
        for place in range(count):
            core = _between(level)
            # One alpha, split between the levels: all ways step alike at one rate.
            scale = ALPHA / len(way.levels) / level.rank
            found[place].append((a_factors[a_of[place]], b_factors[b_of[place]], core, scale))
        first += level.rank
    return found


def _between(level: Level) -> nn.Parameter | None:
    """A layer's own part between A and B, which changes nothing at first."""
    ones = {
        "number": torch.ones(1),
        "vector": torch.ones(level.rank),
        "matrix": torch.eye(level.rank),
    }
    return nn.Parameter(ones[level.between]) if level.between else None


def _steepest(slope_OI: Any, rank: int, above: Sequence[Tensor]) -> Tensor:
    """The first right singular vectors of a gradient, (rank, I), orthogonal to the rows above."""
    if above:
        rows_RI = torch.linalg.svd(torch.cat(list(above)).detach(), full_matrices=False)
        kept_RI = rows_RI[2][rows_RI[1] > 1e-4 * rows_RI[1][0]]
        slope_OI = slope_OI - slope_OI @ kept_RI.mT @ kept_RI
    return torch.linalg.svd(slope_OI)[2][:rank]


def _groups(groups: int, count: int, slopes: Sequence[Tensor] | None) -> list[int]:
    """The group of each layer.

    The first groups are the larger ones, as in a pyramid; or, by gradients, the cuts for which the
    unit gradients have the least variance in their groups.
    """
    if groups == 0:
        return list(range(count))
    if slopes is None:
        size, larger = divmod(count, groups)
        return [group for group in range(groups) for _ in range(size + (group < larger))]
    units = [slope / slope.norm() for slope in slopes]

    def alike(cuts: tuple[int, ...]) -> float:
        ends = zip((0, *cuts), (*cuts, count), strict=True)
        parts = [torch.stack(units[start:end]) for start, end in ends]
        return sum(float(its.sum(0).square().sum()) / len(its) for its in parts)

    cuts = max(combinations(range(1, count), groups - 1), key=alike)
    return [sum(place >= cut for cut in cuts) for place in range(count)]


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
    file = given.output / "results.jsonl"
    given.output.mkdir(parents=True, exist_ok=True)
    rows = read(file)

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

    for name in given.ways:
        best = min(given.rates, key=lambda rate, name=name: loss(name, rate, given.seeds[0]))
        for seed in given.seeds:
            loss(name, best, seed)
        print(name, flush=True)
    # Other processes may have run other ways meanwhile.
    report = ["# Ways to share", "", "## How they stand", "", *table(read(file))]
    (given.output / "report.md").write_text("\n".join(report) + "\n", encoding="utf-8")


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a result file that may not be there yet."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The ways by their mean, each at its best rate, beside the baseline with the same seeds."""
    found = {}
    for name in dict.fromkeys(row["way"] for row in rows):
        its = [row for row in rows if row["way"] == name]
        first = [row for row in its if row["seed"] == its[0]["seed"]]
        rate = min(first, key=lambda row: row["loss"])["learning_rate"]
        found[name] = {row["seed"]: row for row in its if row["learning_rate"] == rate}
    lines = [
        "| way | trainable | rate | loss | above LoRA, r = 6 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    baseline = found[BASELINE]
    for name, by_seed in sorted(found.items(), key=lambda its: mean(_losses(its[1]))):
        losses, row = _losses(by_seed), next(iter(by_seed.values()))
        above = [its["loss"] - baseline[seed]["loss"] for seed, its in by_seed.items()]
        spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        against = f"{mean(above):+.4f} ({min(above):+.4f} to {max(above):+.4f})"
        lines.append(
            f"| {name} | {row['trainable']:,} | {row['learning_rate']:g} | "
            f"{mean(losses):.4f}{spread} | {'–' if name == BASELINE else against} |"
        )
    return lines


def _losses(by_seed: dict[int, dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in by_seed.values()]


if __name__ == "__main__":
    main()
