"""The script that looks for the paper's claims in runs: its chance, its choice, its page."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import msplora
from adapted_llama import adapted
from tiny import llama

ROOT = Path(__file__).resolve().parents[1]


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of benchmarks/, whose neighbours it imports by their bare names."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", ["lora", "msplora"])
def test_a_turned_adapter_keeps_every_spectrum_and_no_direction(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = script("levels", monkeypatch)
    model: Any = adapted()
    if method == "lora":
        config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(llama(), config)
    model.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    (found,) = msplora.analyse(tmp_path).adapters
    turned, other = (levels._of_chance(tmp_path, levels.turned_pair, generator) for _ in range(2))
    random = levels._of_chance(tmp_path, levels.random_pair, generator)
    for kind, its, others, free in zip(
        found.kinds, turned.kinds, other.kinds, random.kinds, strict=True
    ):
        for site, its_site, others_site, free_site in zip(
            kind.sites, its.sites, others.sites, free.sites, strict=True
        ):
            for level, measured in site.levels.items():
                expected = pytest.approx(measured.singular_values, rel=1e-4)
                assert its_site.levels[level].singular_values == expected
                assert free_site.levels[level].singular_values != expected
            assert its_site.key == others_site.key == site.key
        assert its.similarity is not None
        assert others.similarity is not None
        assert its.similarity.cosine[0][1] != others.similarity.cosine[0][1]
    measured = levels.measured(tmp_path, draws=2)
    ranks = [its["effective_rank"]["found"] for its in measured["levels"]]
    assert ranks == [its.effective_rank for its in found.levels]
    assert measured["layers"]["cosine"]["deviation"] > 0


def test_the_best_rate_of_those_with_the_most_seeds_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    levels = script("levels", monkeypatch)
    rows = [
        {"task": task, "model": "base", "name": "LoRA, 8", "metric": metric, "seed": seed}
        | {"learning_rate": rate, "value": value, "setup": {"epochs": 3}}
        for task, metric in (("mrpc", "accuracy"), ("instruction-data", "loss"))
        for rate, seed, value in ((1, 0, 2.0), (1, 1, 4.0), (2, 1, 3.1), (2, 0, 3.2), (3, 0, 9.0))
    ]
    found = [row for _, row in levels.chosen([(Path(), row) for row in rows])]
    assert [(its["task"], its["learning_rate"], its["seed"]) for its in found] == [
        ("instruction-data", 1, 0),
        ("instruction-data", 1, 1),
        ("mrpc", 2, 0),
        ("mrpc", 2, 1),
    ]
    assert found[0]["rates"] == [1, 2, 3]
    low = [row | {"metric": "perplexity"} for row in rows[:4]]
    assert {its["learning_rate"] for _, its in levels.chosen([(Path(), row) for row in low])} == {1}
    # Another base is another row of the tables, with a best rate of its own.
    other = [row | {"model": "other", "value": -row["value"]} for row in rows]
    found = [row for _, row in levels.chosen([(Path(), row) for row in rows + other])]
    assert [(its["task"], its["model"], its["learning_rate"]) for its in found] == [
        *[("instruction-data", "base", 1)] * 2,
        *[("instruction-data", "other", 2)] * 2,
        *[("mrpc", "base", 2)] * 2,
        *[("mrpc", "other", 1)] * 2,
    ]


def test_rows_of_other_tasks_and_adapters_are_kept_with_their_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = script("levels", monkeypatch)
    rows = [
        {"task": task, "model": "base", "name": name, "seed": seed}
        for task, name in (("rte", "LoRA, 8"), ("mrpc", "LoRA, 8"), ("mrpc", "MSPLoRA, 8 + 4 + 2"))
        for seed in (0, 1)
    ]
    rows[0] |= {"commit": "0123abc"}
    (tmp_path / "levels.json").write_text(json.dumps({"commit": "4567def", "runs": rows}))
    new = [{"task": "mrpc", "model": "base", "name": "LoRA, 8", "seed": 0, "commit": "89abcde"}]
    kept = levels.others_of(tmp_path / "levels.json", new)
    assert [(its["task"], its["name"], its["seed"], its["commit"]) for its in kept] == [
        ("rte", "LoRA, 8", 0, "0123abc"),
        ("rte", "LoRA, 8", 1, "4567def"),
        ("mrpc", "MSPLoRA, 8 + 4 + 2", 0, "4567def"),
        ("mrpc", "MSPLoRA, 8 + 4 + 2", 1, "4567def"),
    ]


def test_folders_that_are_no_finished_runs_replace_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = script("levels", monkeypatch)
    result = tmp_path / "levels.json"
    result.write_text("{}")
    given = [str(tmp_path / "nowhere"), "--output", str(result)]
    monkeypatch.setattr("sys.argv", ["levels.py", *given])
    with pytest.raises(SystemExit, match="none of 1 folders is a finished run"):
        levels.main()
    assert result.read_text() == "{}"


def test_runs_that_are_not_seeds_of_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = script("levels", monkeypatch)
    row = {"task": "mrpc", "model": "base", "name": "LoRA, 8", "metric": "accuracy", "seed": 0}
    row |= {"learning_rate": 1, "value": 0.5, "setup": {"adapter": {"use_rslora": False}}}
    other = row | {"seed": 1, "setup": {"adapter": {"use_rslora": True}}}
    with pytest.raises(SystemExit, match="they are not seeds of one"):
        levels.chosen([(Path("a"), row), (Path("b"), other)])
    with pytest.raises(SystemExit, match="b has the seed and rate of another run"):
        levels.chosen([(Path("a"), row), (Path("b"), dict(row))])


def test_bases_are_told_apart_and_called_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    page = script("levels_page", monkeypatch)
    run = next(its[0] for its in page.groups() if its[0]["task"] == "instruction-data")
    alone = page.grouped([run])
    assert [its["trained_on"] for its, *_ in alone] == ["instructions"]
    found = page.grouped([run, run | {"model": "others/gpt"}])
    assert [its["trained_on"] for its, *_ in found] == [
        "instructions, stories260K",
        "instructions, others/gpt",
    ]
    other_task = page.grouped([run | {"task": "my-rows"}])
    assert other_task[0][0]["trained_on"] == "my-rows"
    table = list(page._runs(found))
    assert [row.split(" | ")[1] for row in table[2:]] == ["stories260K", "others/gpt"]


def test_the_page_has_the_tables_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    page = script("levels_page", monkeypatch)
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.rendered(text) == text, "run: python benchmarks/levels_page.py"
    for name in ("ranks", "levels", "layers"):
        assert f"](analysis/{name}.svg)" in text
        assert (page.PAGE.with_suffix("") / f"{name}.svg").is_file()
