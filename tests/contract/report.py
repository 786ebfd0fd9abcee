"""Counts what came of PEFT's tests, with the reason for each that did not pass, and says it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from explained import NOT_RUN, explain

OUTCOMES = ("passed", "failed", "refused", "skipped")
_SHOWN = 200
_METHODS = ("lora", "msplora")


def record(folder: Path, file: str, method: str, commit: str) -> Path:
    """Where the outcomes of a file are kept: of ours by commit, of LoRA's once."""
    return folder / "records" / (method if method == "lora" else commit) / f"{file}.jsonl"


def outcomes(path: Path) -> dict[str, dict[str, Any]]:
    """Test -> what it came to the last time it was run."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = (json.loads(line) for line in lines)
    return {line["test"]: line for line in found if "outcome" in line}


def collect(folder: Path, files: Iterable[str], commit: str) -> dict[str, Any]:
    """Counts per file and method, and what passes with LoRA and does not with ours, by reason.

    Of files that both have been through; the others are named.
    """
    rows: list[dict[str, Any]] = []
    differing: dict[tuple[str, ...], dict[str, Any]] = {}
    not_run: list[str] = []
    for file in files:
        paths = [record(folder, file, method, commit) for method in _METHODS]
        if not all(its.with_suffix(".finished").exists() for its in paths):
            not_run.append(file)
            continue
        lora, ours = (outcomes(its) for its in paths)
        lora = {name: its for name, its in lora.items() if its["uses"]}
        missing = {"outcome": "failed", "why": "it was not run", "seconds": 0}
        ours = {name: ours.get(name, missing) for name in lora}
        rows.append({"file": file, "lora": _counts(lora), "msplora": _counts(ours)})
        for name in sorted(lora):
            its = ours[name]
            if lora[name]["outcome"] != "passed" or its["outcome"] == "passed":
                continue
            reason = explain(name, its["why"])
            line = {"outcome": its["outcome"], "reason": reason}
            if reason is None:
                line["error"] = _without_folders(its["why"])[:_SHOWN]
            found = differing.setdefault(tuple(map(str, line.values())), {**line, "tests": {}})
            test = name.removeprefix("tests/").partition("[")[0]
            found["tests"][test] = found["tests"].get(test, 0) + 1
    return {"rows": rows, "differing": list(differing.values()), "not_run": not_run}


def _without_folders(text: str) -> str:
    """Without what is only true of this machine: paths, and where objects lie in memory."""
    return re.sub(r"(?<![\w.])/[\w./-]+/", "…/", re.sub(r" at 0x[0-9a-f]+", "", text))


def _counts(outcomes_of: dict[str, dict[str, Any]]) -> dict[str, int]:
    counted = Counter(its["outcome"] for its in outcomes_of.values())
    return {outcome: counted[outcome] for outcome in OUTCOMES}


def count(differing: Iterable[dict[str, Any]]) -> int:
    """How many tests these are, each case of a parametrised one for itself."""
    return sum(sum(its["tests"].values()) for its in differing)


def unexplained(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [its for its in found["differing"] if its["reason"] is None]


def show(found: dict[str, Any]) -> None:
    """Print the counts, and what has no explanation."""
    for row in [*found["rows"], _total(found["rows"])]:
        counts = ["/".join(f"{row[method][its]}" for its in OUTCOMES) for method in _METHODS]
        print(f"{row['file']:34} LoRA {counts[0]:>18}  MSPLoRA {counts[1]:>18}")
    print(f"({'/'.join(OUTCOMES)})")
    if found["not_run"]:
        print(f"not run to the end: {', '.join(found['not_run'])}")
    for its in unexplained(found):
        print(f"unexplained, {its['outcome']}: {', '.join(its['tests'])}\n    {its['error']}")


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {
        method: {its: sum(row[method][its] for row in rows) for its in OUTCOMES}
        for method in _METHODS
    }
    return {"file": "all", **sums}


def page(result: dict[str, Any]) -> str:
    """The page for people, of a result file's content."""
    versions = result["versions"]
    rows = result["rows"]
    total = _total(rows)
    lines = [
        "# PEFT's own tests",
        "",
        "PEFT's test-suite is run twice: with its `LoraConfig`, and with `MSPLoraConfig` where a "
        "test says `LoraConfig`. Of its tests those count that use a `LoraConfig`. `make contract` "
        "repeats it, by hand, and writes this page; nothing of PEFT's is kept here.",
        "",
        f"- The tests are those of {result['tests']}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}, Python {versions['python']}; commit {result['commit']}; "
        f"{result['hardware']}.",
        "- Nothing is downloaded but the tests: in place of a model from the hub stands one of the "
        "same architecture, tiny, with random weights. What LoRA fails here needs files of the hub "
        "that nobody can build, or fails for a reason of its own; the other column has the same "
        "tests.",
        "- LoRA's keywords keep their meaning: `r` is the first level's rank, below 4 the levels "
        "are written out (r, r/2, r/4, at least 1), and `lora_alpha` is 8 where a test leaves it "
        "out, as in LoRA.",
        "- *Refused*: the library raised its own error, with the reason.",
        "",
        f"Of the {total['lora']['passed']:,} tests that pass with LoRA, "
        f"{total['lora']['passed'] - count(result['differing']):,} pass with a pyramid.",
        "",
        "| | LoRA passed | failed | skipped | pyramid passed | failed | refused | skipped |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in [*rows, total]:
        name = row["file"] if row is total else f"`{row['file']}.py`"
        counts = [row["lora"][its] for its in ("passed", "failed", "skipped")]
        counts += [row["msplora"][its] for its in OUTCOMES]
        lines.append(f"| {name} | {' | '.join(f'{count:,}' for count in counts)} |")
    lines += ["", "## What does not pass, and why", ""]
    for outcome, heading in (
        ("refused", "Refused, with the reason:"),
        ("failed", "Failed, and why:"),
        ("skipped", "Skipped by the test itself:"),
    ):
        lines += _reasons(
            [its for its in result["differing"] if its["outcome"] == outcome], heading
        )
    lines += ["## Not run", ""]
    if result["not_run"]:
        lines.append(f"- Not yet: {', '.join(f'`{file}`' for file in result['not_run'])}.")
    lines += [f"- {line}" for line in NOT_RUN]
    return "\n".join(lines) + "\n"


def _reasons(differing: list[dict[str, Any]], heading: str) -> list[str]:
    if not differing:
        return []
    counted: Counter[str] = Counter()
    names: dict[str, str] = {}
    for its in differing:
        reason = its["reason"] or "**not explained**"
        counted[reason] += count([its])
        names.setdefault(reason, next(iter(its["tests"])).rpartition("::")[2])
    lines = [heading, "", "| tests | why | such as |", "|---:|---|---|"]
    for reason, number in counted.most_common():
        lines.append(f"| {number} | {reason} | `{names[reason]}` |")
    return [*lines, ""]
