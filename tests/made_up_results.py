"""Made-up result files of the benchmarks, for tests of the page; none of it was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
POINT: Row = {
    "shape": "roberta-base",
    "layers": 12,
    "targets": "query,value",
    "dtype": "float32",
    "batch": 8,
    "length": 128,
    "dropout": 0.0,
    "checkpointing": False,
}
# The median of each method's step, with the floor's as 1.
COSTS = {
    "floor": 1.0,
    "full": 2.4137,
    "lora": 1.2011,
    "lora-again": 1.2035,
    "lora-equal-rank": 1.2203,
    "gralora": 1.3456,
    "vera": 1.2604,
    "branches": 1.4409,
    "msplora": 1.2047,
}
FEW = ("floor", "lora", "lora-again", "msplora")


def around(median: float, width: float = 0.01) -> list[float]:
    """Quartiles with this median, in as many digits as a file has."""
    return [round(median * factor, 6) for factor in (1 - width, 1, 1 + width)]


def step_rows(
    methods: Any = FEW, ours: float = 1.0005, again: float = 1.001, **keys: Any
) -> list[Row]:
    """The rows of a point: ours and the A/A control at these multiples of LoRA's step."""
    to_lora = {name: COSTS.get(name, 1.5) / COSTS["lora"] for name in (*COSTS, *methods)}
    to_lora |= {"msplora": ours, "lora-again": again}
    rounds = keys.pop("rounds", 60)
    place = {**POINT, "compiled": False, **keys}
    return [
        {
            **place,
            "method": method,
            "trainable": 592_130 + 1000 * number,
            "rounds": rounds,
            "seconds": around(0.2 * to_lora[method] * COSTS["lora"]),
            "to_floor": around(to_lora[method] * COSTS["lora"]),
            "to_lora": around(to_lora[method], 0.004),
        }
        for number, method in enumerate(methods)
    ]


def site_rows(**keys: Any) -> list[Row]:
    place = {"in": 768, "out": 768, "tokens": 1024, "dtype": "float32", **keys}
    rows = step_rows(ours=1.031)
    return [{**place, **{name: row[name] for name in _TIMES}} for row in rows]


def memory_rows(**keys: Any) -> list[Row]:
    peaks = {"floor": 500, "full": 2000, "lora": 610, "branches": 688, "msplora": 612}
    return [
        {
            **POINT,
            **keys,
            "method": method,
            "trainable": 100_000,
            "peak_live_bytes": (peak + 400) * 2**20 + 12_345,
            "step_live_bytes": peak * 2**20 + 12_345,
            "resident_bytes": 2 * peak * 2**20,
        }
        for method, peak in peaks.items()
    ]


def size_rows() -> list[Row]:
    model = {"shape": "roberta-base", "targets": "query,value"}
    inject = [
        {"what": "inject", **model, "layers": 12, "method": method, "rounds": 20}
        | {"seconds": around(0.08 * ratio), "to_lora": around(ratio)}
        for method, ratio in (("lora", 1.0), ("msplora", 0.912))
    ]
    file = [
        {"what": "file", **model, "method": method, "trainable": size // 4, "bytes": size}
        | {"header_bytes": 4321, "save_seconds": around(0.01), "load_seconds": around(0.02)}
        | {"save_to_lora": around(ratio), "load_to_lora": around(ratio)}
        for method, size, ratio in (("lora", 1_183_969, 1.0), ("msplora", 545_001, 0.7001))
    ]
    values = [
        {"what": "singular values", "shape": "768x768", "rank": 14, "method": method}
        | {"seconds": around(took), "max_relative_difference": off, "times_faster": times}
        for method, took, off, times in (
            ("dense", 0.11, None, None),
            ("factors", 0.0004, 3.21e-6, 275.04),
        )
    ]
    return inject + file + values


def write(folder: Path, name: str, kind: str, rows: list[Row], **other: Any) -> Path:
    """Write a result file."""
    content = {
        "kind": kind,
        "command": f"msplora bench {kind} --output {name}",
        "commit": "0123abc",
        "hardware": "A made-up processor, 2 threads",
        "versions": {"msplora": "0.0", "python": "3.11", "torch": "2.0", "peft": "0.21"},
        "threads": 2,
        "rows": rows,
        **other,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def sweep_rows() -> list[Row]:
    """A grid with a gap, a series of depths, and one point where ours is slower."""
    rows: list[Row] = []
    for batch in (1, 8, 32):
        for length in (32, 128, 512):
            if (batch, length) in ((8, 128), (32, 512)):
                continue
            slower = batch == 1 and length == 32
            rows += step_rows(
                batch=batch, length=length, ours=1.0612 if slower else 0.9985 + length / 4e5
            )
    for layers, ours in ((3, 1.004), (6, 0.9987), (24, 0.9712)):
        rows += step_rows(layers=layers, ours=ours)
    return rows


def gpu_rows() -> list[Row]:
    rows = step_rows(COSTS, batch=16, length=512, dtype="bfloat16")
    extra = {"tokens_per_second": 123_456.7, "kernel_launches": 1234}
    extra |= {"peak_live_bytes": 3 * 2**30 + 1, "step_live_bytes": 2**30 + 1}
    return [row | extra for row in rows]


def write_all(folder: Path) -> None:
    """Write a file of everything."""
    write(folder, "speed-main.json", "speed", step_rows(COSTS))
    write(folder, "speed-sweep.json", "speed", sweep_rows())
    modes = [{"compiled": True}, {"checkpointing": True}]
    write(folder, "speed-modes.json", "speed", [row for keys in modes for row in step_rows(**keys)])
    sites = [*site_rows(), *site_rows(out=3072), *site_rows(tokens=64)]
    write(folder, "sites.json", "sites", sites)
    write(folder, "memory.json", "memory", [*memory_rows(), *memory_rows(checkpointing=True)])
    write(folder, "size.json", "size", size_rows())
    write(folder, "speed-gpu.json", "speed", gpu_rows(), hardware="A made-up GPU")


_TIMES = ("method", "rounds", "seconds", "to_floor", "to_lora")
