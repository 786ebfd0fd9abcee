"""How long `msplora analyse` takes for adapters of large models, and how much memory.

    python benchmarks/analyse.py --output benchmarks/results/analyse.jsonl

Random factors in the shapes of Llama-2's query and value, and every level trained; each case in a
process of its own. Without a base and without data: intruder dimensions cost what two dense
decompositions of each weight cost.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import msplora
from msplora.analysis.intruders import intruders, left_vectors
from msplora.bench.provenance import provenance
from msplora.pyramid import Level, Plan, Shape, Site, arrange
from msplora.store import STORE_NAME, A, B, name_in_file

# (out, in) of query and value.
SHAPES = {
    "7B": (32, (4096, 4096), (4096, 4096)),
    "70B": (80, (8192, 8192), (1024, 8192)),
    "warm-up": (4, (64, 64), (64, 64)),  # so that no import is measured
}
RANKS = {"lora": [28], "pyramid": [16, 8, 4]}
CASES = [(model, method) for model in ("7B", "70B") for method in RANKS]


def make(folder: Path, model: str, method: str) -> None:
    """Write an adapter with random factors."""
    layers, *shapes = SHAPES[model]
    sites = [
        Site(f"model.layers.{layer}.self_attn.{name}", "model.layers", f"self_attn.{name}", layer,
             Shape("linear", *shape))
        for layer in range(layers)
        for name, shape in zip(("q_proj", "v_proj"), shapes, strict=True)
    ]  # fmt: skip
    config: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": ""}
    if method == "lora":
        levels = [Level("lora", RANKS[method][0], 0, 16)]
        config |= {"peft_type": "LORA", "r": RANKS[method][0], "lora_alpha": 16}
    else:
        groups = [1, 3, 0]
        names = ("global", "mid", "local")
        levels = [Level(*its, 16) for its in zip(names, RANKS[method], groups, strict=True)]
        config |= {"peft_type": "MSPLORA", "ranks": RANKS[method], "groups": groups}
    plan = arrange(sites, levels)
    save_file(tensors(plan, method), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def tensors(plan: Plan, method: str) -> dict[str, torch.Tensor]:
    """Random factors by the names that they have in a file."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for pair in plan.pairs:
        prefix = "base_model.model."
        names = [f"{prefix}{STORE_NAME}.{name_in_file(pair.address, its)}" for its in (A, B)]
        if method == "lora":
            names = [f"{prefix}{pair.sites[0]}.lora_{its}.weight" for its in "AB"]
        shapes = pair.shape.a(pair.rank), pair.shape.b(pair.rank)
        for name, shape in zip(names, shapes, strict=True):
            found[name] = torch.randn(shape, generator=generator) / 100
    return found


def resident(what: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def measure(model: str, method: str) -> dict[str, Any]:
    """Time one analysis, with its page, in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        folder.mkdir()
        make(folder, "warm-up", method)
        msplora.analyse(folder).to_html()
        # Elsewhere: memory that was given back would be taken again, and not be seen to grow.
        command = [sys.executable, __file__, "--make", str(folder), model, method]
        subprocess.run(command, check=True)
        size = (folder / "adapter_model.safetensors").stat().st_size
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmRSS")
        start = time.perf_counter()
        found = msplora.analyse(folder)
        seconds = time.perf_counter() - start
        growth = resident("VmHWM") - before
        start = time.perf_counter()
        (page,) = found.write(Path(name) / "page.html")
        return {
            "model": model,
            "method": method,
            "layers": SHAPES[model][0],
            "rank": sum(RANKS[method]),
            "seconds": seconds,
            "page_seconds": time.perf_counter() - start,
            "page_bytes": page.stat().st_size,
            "factor_bytes": size,
            "resident_growth": growth,
            "threads": torch.get_num_threads(),
        }


def measure_intruders(size: int) -> dict[str, Any]:
    """Time the intruder dimensions of one weight."""
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (
        torch.randn(shape, generator=generator) for shape in ((size, size), (28, size), (size, 28))
    )
    start = time.perf_counter()
    intruders(weight, left_vectors(weight), a / 100, b / 100, 10)
    seconds = time.perf_counter() - start
    return {"intruders_of": size, "seconds": seconds, "threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="The result file, replaced.")
    parser.add_argument("--case", nargs=2, help="One case, printed: a model and a method.")
    parser.add_argument("--make", nargs=3, help="One case's adapter: a folder before the case.")
    parser.add_argument("--intruders", type=int, help="Those of one weight of so many rows.")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*arguments.case)))
        return
    if arguments.make:
        make(Path(arguments.make[0]), *arguments.make[1:])
        return
    if arguments.intruders:
        print(json.dumps(measure_intruders(arguments.intruders)))
        return
    if arguments.output is None:
        parser.error("say where the results go with --output")
    rows = []
    for case in [*(("--case", *its) for its in CASES), ("--intruders", "4096")]:
        command = [sys.executable, __file__, *case]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout) | provenance("cpu"))
        print(json.dumps(rows[-1]))
        arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
