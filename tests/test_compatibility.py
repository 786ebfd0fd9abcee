"""docs/compatibility.md says what the result files say, and its blocks are what was run."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from msplora.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/compatibility.md"
TEXT = PAGE.read_text(encoding="utf-8")


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of benchmarks/, whose neighbours it imports by their bare names."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def results(name: str) -> Any:
    file = ROOT / "benchmarks/results" / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def test_the_table_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    compatibility = benchmark("compatibility", monkeypatch)
    assert compatibility.rendered(TEXT) == TEXT, "run: python benchmarks/compatibility.py"


def test_the_lowest_versions_are_those_that_pip_takes() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = TEXT.partition("## Versions")[2].partition("\n## ")[0]
    lowest = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|$", section, flags=re.MULTILINE))
    python = lowest.pop("Python")
    assert f'requires-python = ">={python}"' in project
    assert len(lowest) == 6
    for name, version in lowest.items():
        assert f'"{name}>={version}"' in project
    shown = f"Python {python}, torch {lowest['torch']}, transformers {lowest['transformers']} and"
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{shown} PEFT {lowest['peft']} or newer" in readme


def test_the_page_of_pefts_own_tests_is_that_of_the_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests/contract")
    contract = results("contract.json")
    text = (ROOT / "docs/contract.md").read_text(encoding="utf-8")
    assert importlib.import_module("report").page(contract) == text
    assert [its for its in contract["differing"] if its["reason"] is None] == []


def test_what_ran_did_not_fail() -> None:
    matrix = results("matrix.json")  # by hand, as the others: what there is has to be green
    for suite in matrix.get("tests", []):
        assert suite["failed"] == []
        assert suite["passed"] > 0
    for its in matrix.get("adapters", []):
        for value in its["differences"].values():
            assert isinstance(value, str) or value < 1e-5
    for its in results("plugins.json")["trainers"]:
        assert its["parameters"] == its["planned"]
        assert its["levels_that_learnt"] == ["global", "local", "mid"]
        assert its["last_loss"] < its["first_loss"]
        assert its["merged_differs_by"] < 1e-3 * its["moved"]
        assert not [said for said in its.get("refused", {}).values() if "not refused" in said]


def test_on_quantised_bases_it_did_what_a_lora_does() -> None:
    for its in results("quantised.json").get("bases", []):
        pyramid, as_lora, lora = its["pyramid"], its["as_lora"], its["lora"]
        assert pyramid["classes"] == as_lora["classes"]
        first, last = pyramid["losses"]
        assert last < first
        for method in (pyramid, lora):
            assert method["starts_off_by"] == method["reloaded_differs_by"] == 0
        scale = pyramid["moved"]
        assert as_lora["differs_by"] < 1e-5 * scale
        assert as_lora.get("merge_refused") == pyramid.get("merge_refused")
        for merged in ("merged_differs_by", "unmerged_differs_by"):
            assert abs(as_lora.get(merged, 0) - pyramid.get(merged, 0)) < 1e-2 * scale


def test_the_blocks_are_what_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = benchmark("plugins", monkeypatch)
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    assert yaml.safe_load(block) == plugins.AXOLOTL_BLOCK
    command = next(
        part for part in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL) if "swift" in part
    )
    for option, value in plugins.SWIFT_OPTIONS.items():
        assert f"{option} {value}" in " ".join(command.split())


def test_the_options_of_the_page_are_those_of_the_command() -> None:
    for line in re.findall(r"^msplora (.*)$", TEXT, flags=re.MULTILINE):
        verb, _, *words = line.split()
        known = {option for its in command_of(verb).params for option in its.opts}
        assert {word for word in words if word.startswith("--")} <= known


def command_of(verb: str) -> Any:
    from typer.main import get_command

    group: Any = get_command(app)
    return group.commands[verb]
