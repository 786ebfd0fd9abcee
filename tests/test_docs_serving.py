"""docs/serving.md: its commands run, its tables are those of the code and of the result file."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model

import msplora
from msplora.serving import SERVERS
from msplora.to_gguf import MODEL_TYPES
from oracle import randomise
from runs import msplora as command
from tiny import llama

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
ROWS = [
    json.loads(line)
    for line in (ROOT / "benchmarks/results/engines.jsonl").read_text("utf-8").splitlines()
]


def engines() -> Any:
    spec = importlib.util.spec_from_file_location("engines", ROOT / "benchmarks/engines.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["engines"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama(layers=3).save_pretrained("base")  # pyright: ignore
    base = type(llama(layers=3)).from_pretrained("base")  # pyright: ignore
    config = msplora.MSPLoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config)
    randomise(model)
    model.save_pretrained("out/run")
    (block,) = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "msplora"
        result = command(*words[1:])
        assert result.code == 0, result.err
        assert "Checked" in result.out
    written = {str(its.relative_to(tmp_path / "out")) for its in Path("out").resolve().glob("*/*")}
    assert {"lora/adapter_config.json", "gguf/adapter.gguf", "mlx/adapters.safetensors"} <= written


def test_the_table_of_the_engines_is_that_of_the_results() -> None:
    assert engines().rendered(TEXT) == TEXT


def test_every_engine_agrees_with_the_pyramid() -> None:
    ran = engines()
    families = {f"tiny {name}" for name in ran.FAMILIES}
    for engine in ran.ENGINES.values():
        mine = [row for row in ROWS if row["engine"] == engine.title]
        if not mine:
            assert f"\n| {engine.title} |" not in TEXT
            continue
        models = {row["model"] for row in mine}
        theirs = families - {f"tiny {name}" for name in engine.without}
        stories = {"stories260K"} if engine.takes_stories else set()
        assert models == stories | (theirs if engine.families else set())
        for row in mine:
            assert row["effect"] > 0.1
            # Where an engine computes the base differently (GELU, it seems), so it does this.
            assert row["difference"] < max(1e-4, 3 * row["base_difference"])
            assert row["difference"] < 1e-3 * row["effect"]
            assert row.get("as_its_converter", True)


def test_what_is_said_of_gelu() -> None:
    gelu = ("Gemma", "Gemma2", "Gemma3", "Starcoder2")
    rest = [row for row in ROWS if row["model"].removeprefix("tiny ") not in gelu]
    assert f"no difference is above {max(row['difference'] for row in rest):.1e}" in TEXT


def test_the_model_types_and_the_limits_are_the_code_s() -> None:
    prose = " ".join(TEXT.split())
    assert f"{', '.join(MODEL_TYPES[:-1])} and {MODEL_TYPES[-1]};" in prose
    ran = engines()
    types = {ran.config_of(family).model_type for family in ran.FAMILIES}
    assert types == set(MODEL_TYPES)
    ranks = SERVERS["vllm"].ranks or ()
    assert f"takes {', '.join(map(str, ranks[:-1]))} or {ranks[-1]};" in prose
    assert f"is {SERVERS['vllm'].default_rank} unless set" in prose


ROW = {
    "DoRA": "DoRA", "biases": "DoRA", "trained tokens": "DoRA", "saved modules": "DoRA",
    "convolution": "convolutions", "attention module": "convolutions",
    "classifier's head": "a classifier's head", "experts": "experts", "embedding": "embeddings",
    "Conv1D": "Conv1D", "outside the language model": "vision and audio",
    "encoder and decoder": "models with encoder", "no language model": "models with encoder",
}  # fmt: skip


def test_the_table_of_refusals_is_the_code_s() -> None:
    assert set(ROW) == {feature for server in SERVERS.values() for feature in server.lacks}
    for feature, begin in ROW.items():
        found = re.search(rf"^\| {begin}.*$", TEXT, flags=re.MULTILINE)
        assert found is not None
        cells = [cell.strip() for cell in found[0].strip("|").split("|")][1:]
        for cell, server in zip(cells, SERVERS.values(), strict=True):
            # No adapter that the engines were run with has one of these.
            assert cell == ("no" if feature in server.lacks else "yes, not run here")
    *names, last = (f"`{name}`" for name in SERVERS)
    assert f"`--for` takes {', '.join(names)} or {last}." in TEXT


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", TEXT):
        assert (ROOT / "docs" / target).exists(), target
