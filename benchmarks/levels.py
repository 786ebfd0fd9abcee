"""What the levels of trained adapters learned: the paper's claims, looked for in finished runs.

    python benchmarks/levels.py RUN … --output benchmarks/results/levels.json
    python benchmarks/levels_page.py

The folders are those of `msplora train`, of plain LoRAs and of pyramids, of any tasks, bases, rates
and seeds. Of each task, base and adapter the rate is taken that has the best mean on the held-out
rows, and all its seeds are analysed by `msplora.analyse`. A figure alone says little: the effective
rank of a level of rank 2 is below that of one of rank 8 whatever it learned. So everything is
measured of chance too, through the same function, by as many adapters of the same shapes as
`--draws` says:

random   A and B are random numbers: what the effective rank of so many directions is
turned   each update keeps its singular values, and its singular vectors are random: what layers
         and levels would have in common if they had learned nothing of each other
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import msplora
from msplora.analysis.measures import effective_ranks
from msplora.analysis.reading_lora import LORA_TENSOR
from msplora.analysis.reading_pyramid import address_of
from msplora.analysis.results import AdapterResult, KindResult, mean
from msplora.bench.provenance import provenance, short
from msplora.loading import CONFIG_FILE, WEIGHTS_FILE, read_config
from msplora.spectrum import singular_values_of
from msplora.train.metric_order import sign_of
from msplora.train.settings import Settings
from msplora.train.task_record import TaskRecord

LEADING = 2
"""So many singular values are compared of every level: as many as the smallest has."""

Pair = tuple[Tensor, Tensor]
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="Folders of finished runs.")
    parser.add_argument("--output", type=Path, required=True, help="The result file, replaced.")
    parser.add_argument("--draws", type=int, default=20, help="Adapters of chance for each run.")
    parser.add_argument(
        "--append", action="store_true", help="Keep what the file has of other tasks and adapters."
    )
    given = parser.parse_args()
    finished = [run for run in given.runs if (run / "metrics.json").is_file()]
    if not finished:
        raise SystemExit(f"none of {len(given.runs)} folders is a finished run of msplora train.")
    runs = chosen(map(described, finished))
    content = {**provenance("cpu"), "draws": given.draws, "leading": LEADING}
    content["command"] = f"python benchmarks/levels.py RUN … --draws {given.draws}"
    of_commit = {"commit": content["commit"]}
    found = [row | of_commit | measured(folder, given.draws, row["seed"]) for folder, row in runs]
    kept = others_of(given.output, found) if given.append else []
    content["runs"] = sorted([*kept, *found], key=lambda row: (*_group(row), row["seed"]))
    given.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def others_of(file: Path, found: Iterable[Row]) -> list[Row]:
    """The rows of a file that are of no task and adapter found now, each with its commit."""
    content = json.loads(file.read_text(encoding="utf-8"))
    now = {_group(row) for row in found}
    return [
        {**row, "commit": row.get("commit", content["commit"])}
        for row in content["runs"]
        if _group(row) not in now
    ]


def described(run: Path) -> tuple[Path, Row]:
    """The folder of a run's adapter, and what the run was."""
    folder = run / "adapter"
    record = TaskRecord.load(folder)
    assert record is not None
    settings, metrics = record.settings, json.loads((run / "metrics.json").read_text("utf-8"))
    config: Any = read_config(folder)
    levels = getattr(config, "pyramid", None)
    ranks = [level.rank for level in levels] if levels else [config.r]
    name = f"{'MSPLoRA' if levels else 'LoRA'}, {' + '.join(map(str, ranks))}"
    data = settings.data.glue or Path(str(settings.data.train)).stem
    return folder, {
        "setup": _setup(settings),
        "task": data,
        "model": short(settings.model),
        "name": name + (", split alpha" if getattr(config, "split_alpha", False) else ""),
        "ranks": ranks,
        "learning_rate": settings.training.learning_rate,
        "seed": settings.seed,
        "metric": metrics["metric_for_best"],
        "value": metrics["best"][metrics["metric_for_best"]],
    }


def _setup(settings: Settings) -> Row:
    """All that a run was told but its rate and seed, and where its files are."""
    told = settings.to_dict()
    for name in ("model", "seed", "output", "report_to"):
        told.pop(name, None)
    told["training"].pop("learning_rate")
    for name in ("path", "train", "validation"):
        told["data"].pop(name, None)
    return told


def chosen(runs: Iterable[tuple[Path, Row]]) -> list[tuple[Path, Row]]:
    """Of every task, base and adapter the runs of its best rate, among those with most seeds.

    Raises:
        SystemExit: adapters of one name differ in more than that, or two runs are of one seed.
    """
    groups: dict[tuple[str, ...], dict[float, list[tuple[Path, Row]]]] = {}
    setups: dict[tuple[str, ...], Row] = {}
    for folder, row in runs:
        row = dict(row)
        setup = row.pop("setup")
        if setups.setdefault(_group(row), setup) != setup:
            raise SystemExit(
                f"{folder} is a run of {row['name']} on {row['task']}, as another one is, and was "
                f"told something else than that: they are not seeds of one. Leave out either."
            )
        by_rate = groups.setdefault(_group(row), {})
        others = by_rate.setdefault(row["learning_rate"], [])
        if row["seed"] in [its["seed"] for _, its in others]:
            raise SystemExit(f"{folder} has the seed and rate of another run. Leave out either.")
        others.append((folder, row))
    found = []
    for by_rate in groups.values():
        most = max(map(len, by_rate.values()))
        best = max((its for its in by_rate.values() if len(its) == most), key=_goodness)
        tried = {"rates": sorted(by_rate)}
        found += [(folder, row | tried) for folder, row in best]
    return sorted(found, key=lambda its: (*_group(its[1]), its[1]["seed"]))


def _group(row: Row) -> tuple[str, ...]:
    """What the seeds of one row of the tables have in common."""
    return row["task"], row["model"], row["name"]


def _goodness(runs: Sequence[tuple[Path, Row]]) -> float:
    value = statistics.fmean(row["value"] for _, row in runs)
    return sign_of(runs[0][1]["metric"]) * value


def measured(folder: Path, draws: int, seed: int = 0) -> Row:
    """One run's figures, each beside those of chance, which has the seed of the run."""
    print(folder, flush=True)
    found, generator = _analysed(folder), torch.Generator().manual_seed(seed)
    random = [_of_chance(folder, random_pair, generator) for _ in range(draws)]
    turned = [_of_chance(folder, turned_pair, generator) for _ in range(draws)]
    return {
        "parameters": found.parameters,
        "levels": [
            {"level": its.level, "rank": its.rank, "share": its.share, "norm": its.norm} | ranks
            for its, ranks in zip(
                found.levels, beside_chance(ranks_of(found), map(ranks_of, random)), strict=True
            )
        ],
        "layers": beside_chance(between_layers(found), map(between_layers, turned)),
        "between_levels": beside_chance(between_levels(found), map(between_levels, turned)),
        "kinds": [
            {"kind": kind.name, "layers": len(kind.sites)}
            | beside_chance(curves(kind), [curves(its.kinds[place]) for its in turned])
            for place, kind in enumerate(found.kinds)
        ],
    }


def _analysed(folder: Path) -> AdapterResult:
    (found,) = msplora.analyse(folder).adapters
    return found


def ranks_of(adapter: AdapterResult) -> list[Row]:
    """Of every level, over all weights that it changes."""
    found = []
    for its in adapter.levels:
        spectra = [
            site.levels[its.level].singular_values[:LEADING]
            for kind in adapter.kinds
            for site in kind.sites
            if site.levels[its.level].norm > 0
        ]
        leading = effective_ranks(torch.tensor(spectra, dtype=torch.float64))
        found.append(
            {
                "effective_rank": its.effective_rank,
                "stable_rank": its.stable_rank,
                "leading": float(leading.mean()),
            }
        )
    return found


def between_layers(adapter: AdapterResult) -> Row:
    """How alike the layers are: means over the kinds; what is shared has the first level's rank."""
    rank = adapter.levels[0].rank
    likeness = [kind.likeness() for kind in adapter.kinds]
    shared = [kind.shared for kind in adapter.kinds if kind.shared is not None]
    return {
        "cosine": mean(cosine for cosine, _, _ in likeness),
        "columns": mean(columns for _, columns, _ in likeness),
        "rows": mean(rows for _, _, rows in likeness),
        "shared_columns": mean(its.columns[rank - 1] for its in shared),
        "shared_rows": mean(its.rows[rank - 1] for its in shared),
        "shared_pair": mean(its.pair[rank - 1] for its in shared),
    }


def between_levels(adapter: AdapterResult) -> list[Row]:
    """Each level within the span of others: means over the kinds and layers."""
    found = []
    for of_kinds in zip(*(kind.decoupling for kind in adapter.kinds), strict=True):
        row = {"level": of_kinds[0].level, "of": " + ".join(of_kinds[0].of)}
        for figure in ("columns", "rows", "cosine"):
            row[figure] = mean(value for its in of_kinds for value in getattr(its, figure))
        found.append(row)
    return found


def curves(kind: KindResult) -> Row:
    """What is drawn of one kind: a value for each k."""
    similarity, shared = kind.similarity, kind.shared
    assert similarity is not None
    assert shared is not None
    return {
        "principal_columns": list(similarity.principal_columns),
        "principal_rows": list(similarity.principal_rows),
        "shared_columns": list(shared.columns),
        "shared_rows": list(shared.rows),
        "shared_pair": list(shared.pair),
    }


def beside_chance(found: Any, draws: Iterable[Any]) -> Any:
    """The same structure with each number as what was found, chance's mean and its deviation."""
    draws = list(draws)
    if isinstance(found, dict):
        return {key: beside_chance(its, [one[key] for one in draws]) for key, its in found.items()}
    if isinstance(found, list):
        columns = zip(*draws, strict=True)
        return [beside_chance(*its) for its in zip(found, columns, strict=True)]
    if not isinstance(found, float):
        return found
    return {
        "found": found,
        "chance": statistics.fmean(draws),
        "deviation": statistics.stdev(draws),
    }


def random_pair(a_RI: Tensor, b_OR: Tensor, generator: torch.Generator) -> Pair:
    """Factors of random numbers; their size changes no figure that is looked at."""
    return (
        torch.randn(a_RI.shape, generator=generator),
        torch.randn(b_OR.shape, generator=generator),
    )


def turned_pair(a_RI: Tensor, b_OR: Tensor, generator: torch.Generator) -> Pair:
    """Factors of an update with the same singular values, and random singular vectors."""
    values = singular_values_of(a_RI, b_OR)
    rows, columns = (
        torch.linalg.qr(torch.randn(size, len(values), dtype=torch.float64, generator=generator)).Q
        for size in (a_RI.shape[1], b_OR.shape[0])
    )
    rest = len(a_RI) - len(values)
    a = torch.nn.functional.pad(rows.mT, (0, 0, 0, rest))
    b = torch.nn.functional.pad(columns * values, (0, rest))
    return a.float(), b.float()


def _of_chance(
    folder: Path, change: Callable[..., Pair], generator: torch.Generator
) -> AdapterResult:
    """What is found of an adapter like this one with other factors."""
    with tempfile.TemporaryDirectory() as name:
        shutil.copy(folder / CONFIG_FILE, name)
        save_file(
            changed(load_file(folder / WEIGHTS_FILE), change, generator), Path(name, WEIGHTS_FILE)
        )
        return _analysed(Path(name))


def changed(
    tensors: dict[str, Tensor], change: Callable[..., Pair], generator: torch.Generator
) -> dict[str, Tensor]:
    """An adapter's file with each of its pairs changed, and all else left out."""
    pairs: dict[str, dict[str, str]] = defaultdict(dict)
    for name in tensors:
        match, address = LORA_TENSOR.fullmatch(name), address_of(name)
        if address:
            pairs[address[0]][address[1][-1]] = name
        elif match:
            pairs[match.group(1)][match.group(2)] = name
    found = {}
    for names in pairs.values():
        a, b = change(tensors[names["A"]], tensors[names["B"]], generator)
        found |= {names["A"]: a.contiguous(), names["B"]: b.contiguous()}
    return found


if __name__ == "__main__":
    main()
