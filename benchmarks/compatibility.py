"""Render the table of docs/compatibility.md from the result files.

python benchmarks/compatibility.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = RESULTS.parents[1] / "docs" / "compatibility.md"
BEGIN, END = "<!-- rows -->", "<!-- end of rows -->"
NAMES = {"oldest": "PEFT", "middle": "PEFT", "newest": "PEFT", "trainers": "TRL"}
NAMES |= {"harness": "lm-evaluation-harness"}


def rows() -> Iterator[tuple[str, str, str, str]]:
    """Tool, version, what was run, result."""
    matrix = _read("matrix.json")
    for its in matrix.get("tests", []):
        yield _tested(its)
    yield from _across(matrix)
    yield from _pefts_own(_read("contract.json"))
    for its in _read("plugins.json").get("trainers", []):
        yield from _trained(its)


def _tested(suite: dict[str, Any]) -> tuple[str, str, str, str]:
    versions = suite["versions"]
    main = {"trainers": "trl", "harness": "lm_eval"}.get(suite["environment"], "peft")
    beside = [f"{name} {versions[name]}" for name in ("peft", "transformers") if name != main]
    count = f"{suite['passed']} passed, {len(suite['failed'])} failed"
    skipped = sum(suite["skipped"].values())
    files = len(suite["files"])
    run = f"{files} files of our tests" if files > 2 else " and ".join(
        f"`{file}`" for file in suite["files"]
    )  # fmt: skip
    return (
        NAMES[suite["environment"]],
        f"{versions[main]} ({', '.join(beside)})",
        run,
        count + (f", {skipped} skipped" if skipped else ""),
    )


def _across(matrix: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    peft = {its["environment"]: its["versions"]["peft"] for its in matrix.get("tests", [])}
    for writer in dict.fromkeys(its["written_by"] for its in matrix.get("adapters", [])):
        found = [its for its in matrix["adapters"] if its["written_by"] == writer]
        numbers = [
            value
            for its in found
            for value in its["differences"].values()
            if not isinstance(value, str)
        ]
        readers = ", ".join(peft[its["read_by"]] for its in found)
        yield (
            "PEFT",
            peft[writer],
            f"adapters it wrote, read by {readers}: {len(numbers)} times",
            f"logits within {max(numbers):.0e}" if max(numbers) else "the same logits, bit for bit",
        )


def _pefts_own(contract: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    if not contract:
        return
    versions = contract["versions"]
    with_lora = sum(its["lora"]["passed"] for its in contract["rows"])
    refused = sum(its["outcome"] == "refused" for its in contract["differing"])
    yield (
        "PEFT",
        f"{versions['peft']} (transformers {versions['transformers']})",
        f"its own tests of LoRA, {len(contract['rows'])} files ([each](contract.md))",
        f"of {with_lora:,} that LoRA passes {with_lora - len(contract['differing']):,} pass, "
        f"{refused:,} are refused, {len(contract['differing']) - refused:,} do not pass",
    )


def _trained(trainer: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    name = trainer["trainer"]
    versions = trainer["versions"]
    version = f"{versions[name]} (peft {versions['peft']}, transformers {versions['transformers']})"
    tool = {"axolotl": "Axolotl", "ms-swift": "ms-swift"}[name]
    yield (
        tool,
        version,
        f"its own command, {trainer['steps']} steps on stories260K, read here",
        f"loss {trainer['first_loss']:.2f} to {trainer['last_loss']:.2f}; "
        f"{trainer['parameters']:,} parameters, as planned",
    )
    resumed, merged = trainer["resumed_differs_by"], trainer["merged_differs_by"]
    yield (
        tool,
        version,
        "went on from its checkpoint; merged by its own command",
        f"{'the same bits' if not resumed else f'factors within {resumed:.0e}'}; "
        f"logits within {merged:.0e} of the adapter's, which moved them by {trainer['moved']:.0f}",
    )
    if trainer.get("refused"):
        yield tool, version, ", ".join(trainer["refused"]), "refused with the reason"


def table() -> str:
    """The rows as the page has them."""
    lines = ["| tool | version | run | result |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows()]
    return "\n".join(lines)


def rendered(page: str) -> str:
    """The page with its table made anew."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", page, flags=re.DOTALL)


def _read(name: str) -> dict[str, Any]:
    file = RESULTS / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
