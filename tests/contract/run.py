"""PEFT's own test-suite as a contract: its LoRA tests, run with LoRA and with our config.

    make contract            # all of it
    python tests/contract/run.py --files test_config test_auto --again

PEFT's tests are fetched (`peft_tests.py`), the models they load from the hub are built
(`local_models.py`), and each file is run twice, each time in a process of its own (`plugin.py`):
with PEFT's LoRA, which says which tests are LoRA's and which run at all without the network, and
with MSPLoRA in its place. What each test came to is kept beside, so that a run that was stopped
goes on. `report.py` counts, explains (`explained.py`) and writes the result file and the page.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft_tests
import report

from msplora.bench import provenance

HERE = Path(__file__).resolve().parent
METHODS = ("lora", "msplora")
FILES = (
    "test_custom_models",
    "test_initialization",
    "test_config",
    "test_low_level_api",
    "test_tuners_utils",
    "test_lora_conversion",
    "test_target_parameters",
    "test_trainable_tokens",
    "test_lora_variants",
    "test_other",
    "test_helpers",
    "test_auto",
    "test_mapping",
    "test_loraplus",
    "test_lorafa",
    "test_riemannian_lora",
    "test_lora_intruders",
    "test_hub_features",
    "test_integrations",
    "test_token_classification_qa",
    "test_vision_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_encoder_decoder_models",
    "test_decoder_models",
)
SECONDS_PER_TEST = 120
SECONDS_PER_FILE = 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--files", nargs="+", default=FILES, help="all by default")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument(
        "--again", action="store_true", help="run again what failed or was refused with MSPLoRA"
    )
    parser.add_argument("--peft", type=Path, help="a checkout of PEFT to take the tests from")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "msplora",
        help="where the tests, the models and what came of each test are kept (%(default)s)",
    )
    parser.add_argument("--output", type=Path, help="the result file; not written if left out")
    parser.add_argument("--page", type=Path, help="the page for people, beside --output")
    arguments = parser.parse_args()

    folder = arguments.cache / f"contract-peft-{importlib.metadata.version('peft')}"
    origin = peft_tests.fetch(folder, arguments.peft)
    commit = provenance.commit()
    if arguments.output and not commit.isalnum():
        raise SystemExit(f"the checkout is {commit}: commit first, so that the results name it.")
    for method in arguments.methods:
        build_models(folder, method)
        for file in arguments.files:
            print(f"{method}: {file}", flush=True)
            run_file(folder, file, method, commit, again=arguments.again)
    found = report.collect(folder, [its for its in FILES if its in arguments.files], commit)
    report.show(found)
    if arguments.output:
        result = {**provenance.provenance("cpu"), "tests": origin, **found}
        result["command"] = f"python tests/contract/{result['command']}"
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if arguments.page:
            arguments.page.write_text(report.page(result), encoding="utf-8")
    if report.unexplained(found):
        raise SystemExit(1)


def build_models(folder: Path, method: str) -> None:
    """The stand-ins for the hub's models, and adapters of the method; kept from run to run."""
    hub = folder / f"hub-{method}"
    if (hub / "complete").is_file():
        return
    command = [sys.executable, "-W", "ignore", str(HERE / "local_models.py"), str(hub / "hub")]
    subprocess.run([*command, "--method", method], check=True, env=_offline(hub))
    (hub / "complete").touch()


def _offline(hub: Path) -> dict[str, str]:
    """The environment of a process that finds its models in the cache `hub` alone."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(hub)}
    return {**os.environ, **offline, "TOKENIZERS_PARALLELISM": "false"}


def run_file(folder: Path, file: str, method: str, commit: str, again: bool) -> None:
    """Run what is left of a file's tests; a test that ends the process is one that failed."""
    record = report.record(folder, file, method, commit)
    record.parent.mkdir(parents=True, exist_ok=True)
    # Which tests are LoRA's is known only when all have been collected; ours are told by LoRA's.
    finished = record.with_suffix(".finished")
    if method == "lora" and finished.exists():
        return
    finished.unlink(missing_ok=True)
    only = None
    if method == "msplora":
        lora = report.outcomes(report.record(folder, file, "lora", commit))
        only = {name for name, its in lora.items() if its["uses"]}
    if again and method == "msplora":
        _forget(record)
    while True:
        done = set(report.outcomes(record))
        if only is not None and only <= done:
            finished.touch()
            return
        problem = _run_once(folder, file, method, record, only, done)
        started = _unfinished(record)
        if problem is None or started is None:
            if problem is not None:
                print(f"{file} cannot be run with {method}: {problem}")
            else:
                finished.touch()
            return
        line = {"test": started, "uses": True, "seconds": 0, "outcome": "failed", "why": problem}
        with record.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


def _run_once(
    folder: Path, file: str, method: str, record: Path, only: set[str] | None, done: set[str]
) -> str | None:
    """One process; what ended it early, `None` if nothing did."""
    with tempfile.TemporaryDirectory() as temporary:
        lists: dict[str, str] = {}
        for name, values in (("CONTRACT_ONLY", only), ("CONTRACT_DONE", done)):
            if values is not None:
                path = Path(temporary) / name
                path.write_text("\n".join(sorted(values)), encoding="utf-8")
                lists[name] = str(path)
        paths = [str(HERE), str(folder), str(folder / "packages")]
        paths.append(os.environ.get("PYTHONPATH", ""))
        environment = {
            **_offline(folder / f"hub-{method}"),
            **lists,
            "CONTRACT_METHOD": method,
            "CONTRACT_RECORD": str(record),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        (Path(temporary) / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        options = ["-q", "-p", "plugin", "-p", "no:cacheprovider", "-p", "no:randomly"]
        command = [
            sys.executable, "-m", "pytest", *options,
            f"--timeout={SECONDS_PER_TEST}", f"--rootdir={folder}", "--tb=line", "-W", "ignore",
            "-c", str(Path(temporary) / "pytest.ini"), f"tests/{file}.py",
        ]  # fmt: skip
        log = record.with_suffix(".log")
        with log.open("w", encoding="utf-8") as out:
            try:
                code = subprocess.run(
                    command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT,
                    timeout=SECONDS_PER_FILE, check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                return f"more than {SECONDS_PER_FILE} s for the file"
    # 0: passed, 1: some failed, 5: nothing was left to run.
    if code in (0, 1, 5):
        return None
    return f"the process ended with {code} (see {log})"


def _unfinished(record: Path) -> str | None:
    """The test that was running when its process ended."""
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    last = json.loads(lines[-1]) if lines else {}
    return last["test"] if "started" in last else None


def _forget(record: Path) -> None:
    """Take out of a record what failed or was refused."""
    kept: dict[str, Any] = report.outcomes(record)
    with record.open("w", encoding="utf-8") as out:
        for line in kept.values():
            if line["outcome"] in ("passed", "skipped"):
                out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
