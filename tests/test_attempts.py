"""The trial of other ways to share: its starts, its penalty, and what it adds to its rows."""

from __future__ import annotations

import importlib.util
import json
import sys
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from runs import save_decoder
from tiny import llama

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which imports its neighbour by its bare name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("attempts", BENCHMARKS / "attempts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sites_of(attempts: ModuleType, way: str) -> list[Any]:
    """The layers of a way on four layers of a tiny Llama; the queries come first."""
    model = get_peft_model(llama(4), LoraConfig(target_modules=["q_proj", "v_proj"]))
    return attempts.put_on(model, attempts.WAYS[way], {})


def test_an_orthogonal_start_is_so_in_every_layer_and_another_in_each(
    attempts: ModuleType,
) -> None:
    sites = sites_of(attempts, "pyramid, orthogonal at the start")
    for site in sites:
        rows_RI = torch.cat(list(site.a)).detach()
        expected = torch.eye(len(rows_RI)) / 3  # rows as long as LoRA's
        torch.testing.assert_close(rows_RI @ rows_RI.mT, expected, atol=1e-5, rtol=0)
    for kind in (sites[:4], sites[4:]):
        assert len({id(site.a[0]) for site in kind}) == 1
        assert len({id(site.a[1]) for site in kind}) == 3
        for one, two in combinations([site.a[2] for site in kind], 2):
            assert not torch.allclose(one, two, atol=1e-2)


def test_the_penalty_is_felt_from_the_start_and_parts_the_levels(attempts: ModuleType) -> None:
    torch.manual_seed(0)
    way = attempts.WAYS["pyramid, levels held apart (1)"]
    sites = sites_of(attempts, "pyramid, levels held apart (1)")
    summed = sum(
        torch.cosine_similarity(one, two, dim=0).square()
        for site in sites
        for upper, lower in combinations(site.a, 2)
        for one in upper
        for two in lower
    )
    penalty = way.penalty * attempts.apart(sites)
    torch.testing.assert_close(penalty, summed / len(sites))
    optimizer = torch.optim.SGD(sites[0].a.parameters(), lr=0.5)
    before = attempts.cosines(sites[0]).mean().item()
    assert before > 0.01
    for _ in range(20):
        optimizer.zero_grad()
        attempts.apart(sites).backward()
        optimizer.step()
    assert attempts.cosines(sites[0]).mean().item() < 0.8 * before


def test_a_way_without_levels_has_no_cosines(attempts: ModuleType) -> None:
    assert attempts.apart(sites_of(attempts, attempts.BASELINE)) == 0


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0.02, [0.01, 0.02, 0.04]),
        (0.04, [0.01, 0.02, 0.04, 0.08]),
        (0.16, [0.01, 0.02, 0.04, 0.08]),  # two further ones at most
        (0.005, [0.0025, 0.005, 0.01, 0.02]),
    ],
)
def test_a_best_rate_at_an_end_is_followed(
    attempts: ModuleType, best: float, tried: list[float]
) -> None:
    seen = []

    def loss(rate: float) -> float:
        seen.append(rate)
        return abs(rate / best - 1)

    assert attempts.best_rate([0.01, 0.02], loss) == min(tried, key=lambda its: abs(its / best - 1))
    assert sorted(seen) == tried


def row(way: str, rate: float, seed: int, loss: float) -> dict[str, Any]:
    return {"way": way, "learning_rate": rate, "seed": seed, "loss": loss, "trainable": 7}


def run(
    attempts: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str
) -> list[tuple[str, float, int]]:
    """Run the script with made-up losses, best at a rate of 0.02; return what it trained."""
    trained: list[tuple[str, float, int]] = []
    names = {id(way): name for name, way in attempts.WAYS.items()}

    def one_run(_: Any, way: Any, rate: float, seed: int) -> dict[str, Any]:
        trained.append((names[id(way)], rate, seed))
        return {"loss": abs(rate / 0.02 - 1) + seed, "trainable": 7}

    monkeypatch.setattr(attempts, "one_run", one_run)
    given = ["--model", "decoder", "--data", "rows.json", "--output", "out"]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["attempts.py", *given, *flags])
    attempts.main()
    return trained


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_decoder(tmp_path / "decoder")
    (tmp_path / "rows.json").write_text("[]")
    return tmp_path


def test_the_baseline_is_run_first_whatever_is_asked_for(
    attempts: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = "pyramid 8, 4, 2"
    trained = run(attempts, place, monkeypatch, "--ways", way, "--seeds", "0", "1")
    each = [(rate, 0) for rate in (5e-3, 1e-2, 2e-2, 4e-2)] + [(2e-2, 1)]
    assert trained == [(name, *its) for name in (attempts.BASELINE, way) for its in each]
    assert f"| {way} | 7 | 0.02 |" in (place / "out/report.md").read_text()
    assert run(attempts, place, monkeypatch, "--ways", way, "--seeds", "0", "1") == []


@pytest.mark.parametrize("what", ["data", "model"])
def test_runs_of_other_data_or_another_model_are_not_added_to(
    attempts: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    flags = ["--ways", attempts.BASELINE, "--seeds", "0"]
    run(attempts, place, monkeypatch, *flags)
    before = (place / "out/results.jsonl").read_text()
    if what == "data":
        (place / "rows.json").write_text("[1]")
    else:
        save_decoder(place / "decoder", layers=2)
    with pytest.raises(SystemExit, match=rf"has runs of another {what} \(SHA-256"):
        run(attempts, place, monkeypatch, *flags)
    assert (place / "out/results.jsonl").read_text() == before


def test_rows_that_name_no_model_are_of_this_one(
    attempts: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--ways", attempts.BASELINE, "--seeds", "0"]
    run(attempts, place, monkeypatch, *flags)
    file = place / "out/results.jsonl"
    rows = attempts.read(file)
    assert all(its.pop("model_sha256") for its in rows)
    file.write_text("".join(json.dumps(its) + "\n" for its in rows))
    assert run(attempts, place, monkeypatch, *flags) == []
    with pytest.raises(SystemExit, match="no folder with a model's weights"):
        attempts.weights_of("some/model")


def test_a_way_is_compared_with_the_seeds_that_the_baseline_has(attempts: ModuleType) -> None:
    rows = [
        row(attempts.BASELINE, 0.02, 0, 3.0),
        row("more seeds", 0.02, 0, 2.9),
        row("more seeds", 0.02, 1, 5.0),
        row("another seed", 0.02, 2, 3.5),
    ]
    lines = attempts.table(rows)
    assert "+0.1000 (+0.1000 to +0.1000)" in next(its for its in lines if "more seeds" in its)
    assert next(its for its in lines if "another seed" in its).endswith("| 3.5000 | – |")
    assert attempts.table(rows[1:])[2].endswith("| – |")


def test_half_a_row_is_left_out_and_its_run_made_again(
    attempts: ModuleType,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--ways", attempts.BASELINE, "--seeds", "0", "1"]
    run(attempts, place, monkeypatch, *flags)
    report = (place / "out/report.md").read_text()
    file = place / "out/results.jsonl"
    file.write_text(file.read_text()[:-20])  # of the last one, as after a kill
    assert run(attempts, place, monkeypatch, *flags) == [(attempts.BASELINE, 2e-2, 1)]
    assert "line 5 is half a row, of a run that was killed" in capsys.readouterr().out
    assert run(attempts, place, monkeypatch, *flags) == []
    assert (place / "out/report.md").read_text() == report


def test_the_table_has_the_rate_that_is_run_with_all_seeds(
    attempts: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the best one is of an earlier start, which was given other rates."""
    way = ["--ways", attempts.BASELINE]
    run(attempts, place, monkeypatch, *way, "--seeds", "0", "--rates", "0.02", "0.01")
    seeds = ["--seeds", "0", "1", "2"]
    trained = run(attempts, place, monkeypatch, *way, *seeds, "--rates", "1e-3", "2e-3", "1.5e-3")
    assert [its for its in trained if its[2] > 0] == [
        (attempts.BASELINE, 2e-2, its) for its in (1, 2)
    ]
    assert "| 0.02 | 1.0000 ± 1.0000 |" in (place / "out/report.md").read_text()


def test_the_report_is_that_of_the_rows(attempts: ModuleType) -> None:
    folder = BENCHMARKS / "results/attempts"
    assert attempts.report(attempts.read(folder / "results.jsonl")) == (
        folder / "report.md"
    ).read_text(encoding="utf-8")
