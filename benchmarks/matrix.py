"""The core's tests under several versions of PEFT and transformers, and adapters read across them.

    python benchmarks/matrix.py --cache .environments --output benchmarks/results/matrix.json

Makes an environment per pair of versions (about 1.5 GB each), runs in it the tests that need no
more than the core, then lets each environment write adapters and every other read them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from environments import ROOT, TESTING, environment, run_in, versions_in

from msplora.bench.provenance import provenance

# The files whose tests ask something of PEFT or transformers, and need no more than the core.
CORE = (
    "adapter_files", "architectures", "cli_plan", "config", "convert", "copies_and_training",
    "elalora", "generating", "golden", "hydra", "layouts", "offload", "on_shapes", "options",
    "peft_helpers", "plain_modules", "refusals", "several_adapters", "sisters", "swapping", "traps",
)  # fmt: skip
TRAINING = (
    "--constraint", "constraints.txt", "peft", "transformers", "trl", "accelerate", "datasets",
    "pydantic", "pyyaml", "scikit-learn", "scipy", "matplotlib", "pillow", "psutil",
    "lm_eval==0.4.13",
)  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """What is installed beside torch and pytest, which tests are run, and whose versions count."""

    requirements: tuple[str, ...]
    tests: tuple[str, ...]
    packages: tuple[str, ...] = ()
    writes_adapters: bool = False


SUITES = {
    "oldest": Suite(("peft==0.18.1", "transformers==4.57.6"), CORE, (), True),
    "middle": Suite(("peft==0.19.1", "transformers==5.14.1"), CORE, (), True),
    "newest": Suite(("peft", "transformers"), CORE, (), True),
    "trainers": Suite(TRAINING, ("trainers", "trl"), ("trl",)),
    "harness": Suite(TRAINING, ("harness",), ("lm_eval",)),
}


def main() -> None:
    """Run every environment, write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="Where environments are kept.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(SUITES), help="Run these alone.")
    given = parser.parse_args()
    before = json.loads(given.output.read_text()) if given.output.is_file() else {"tests": []}
    tested = {its["environment"]: its for its in before["tests"]}
    pythons = {
        name: environment(
            given.cache,
            "training" if suite.requirements == TRAINING else name,
            *suite.requirements,
            *TESTING,
        )
        for name, suite in SUITES.items()
        if name in given.only or suite.writes_adapters
    }
    adapters = before.get("adapters", [])

    def write() -> None:
        ran = [tested[name] for name in SUITES if name in tested]
        content = {**provenance("cpu"), "tests": ran, "adapters": adapters}
        given.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    for name in given.only:
        tested[name] = {"environment": name, **test(SUITES[name], pythons[name])}
        print(json.dumps(tested[name], indent=1), flush=True)
        write()
    adapters = across({name: its for name, its in pythons.items() if SUITES[name].writes_adapters})
    write()


def test(suite: Suite, python: Path) -> dict[str, Any]:
    """Run a suite's tests; return their counts, failures and reasons for skipping."""
    files = [f"tests/test_{name}.py" for name in suite.tests]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        start = time.perf_counter()
        done = run_in(
            python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
            *(["-m", "slow or not slow"] if suite.tests != CORE else []), *files,
            check=False, more={"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        seconds = time.perf_counter() - start
        cases = list(ElementTree.parse(report).iter("testcase"))
    if done.returncode:
        print(done.stdout[-20000:], file=sys.stderr)
    failed = [case for case in cases if {"failure", "error"} & {part.tag for part in case}]
    skipped = [part.get("message", "") for case in cases for part in case if part.tag == "skipped"]
    return {
        "versions": versions_in(python, "torch", "transformers", "peft", *suite.packages),
        "files": files,
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
        "skipped": dict(Counter(skipped)),
        "seconds": round(seconds),
    }


def across(pythons: dict[str, Path]) -> list[dict[str, Any]]:
    """Let each environment write adapters and every one read them."""
    script = str(ROOT / "benchmarks" / "across_versions.py")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, python in pythons.items():
            run_in(python, script, "write", f"{folder}/{name}")
        for reader, python in pythons.items():
            folders = [f"{folder}/{writer}" for writer in pythons]
            found = json.loads(run_in(python, script, "read", *folders).stdout.splitlines()[-1])
            for writer, differences in zip(pythons, found, strict=True):
                rows.append({"written_by": writer, "read_by": reader, "differences": differences})
    return rows


if __name__ == "__main__":
    main()
