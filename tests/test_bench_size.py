"""`msplora bench size`, on tiny models: what is measured and written; never how long it took."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import get_peft_model
from typer.testing import CliRunner

import msplora
from msplora.bench import fits, results, size
from msplora.bench.size_points import FilePoint, InjectPoint, ValuesPoint, inject_points
from msplora.cli.bench_size import size as command
from msplora.errors import MSPLoraError

ROBERTA_QV = FilePoint("tiny-roberta", "qv")
TINY = ["--shape", "tiny-llama", "--file-shape", "tiny-roberta", "--rounds", "2", "--threads", "1"]
TINY += ["--layers", "2", "--layers", "3", "--side", "40", "--rank", "7", "--rank", "3"]


def run(*arguments: Any) -> Any:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [*TINY, *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module", autouse=True)
def _a_commit() -> Iterator[None]:
    """Measuring goes on in a checkout with changes, too, but not in one file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMMIT", "0123abc")
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("size") / "size.json"
    return path, run("--output", path).output


@pytest.mark.slow
def test_the_file_has_a_row_for_every_method_at_every_point(written: tuple[Path, str]) -> None:
    content = results.read(written[0])
    assert content["kind"] == "size"
    assert set(content) == {"kind", "command", "commit", "hardware", "versions", "threads", "rows"}
    found = {
        (row["what"], row["shape"], row.get("layers"), row.get("targets"), row.get("rank"))
        for row in content["rows"]
    }
    assert found == {
        ("inject", "tiny-llama", 4, "qv", None),
        *(("inject", "tiny-llama", layers, "all-linear", None) for layers in (2, 3, 4)),
        *(("file", "tiny-roberta", None, targets, None) for targets in ("qv", "all-linear")),
        *(("singular values", "40x40", None, None, rank) for rank in (3, 7)),
    }
    assert len(content["rows"]) == 6 * 3 + 2 * 2
    for row in content["rows"]:
        assert row["rounds"] == 2
        for name, value in row.items():
            if name.endswith("seconds") or "to_lora" in name:
                assert value == sorted(value)
                assert value[0] > 0


def test_the_page_of_the_benchmarks_reads_it(written: tuple[Path, str]) -> None:
    from msplora.bench.reading import read_results

    [file] = read_results(written[0].parent)
    assert len(file.rows) == 22


def test_lora_is_what_ratios_are_to(written: tuple[Path, str]) -> None:
    for row in results.read(written[0])["rows"]:
        if row["method"] == "lora":
            assert {*row.get("to_lora", []), *row.get("save_to_lora", [])} == {1.0}


def test_a_table_for_every_point_is_printed(written: tuple[Path, str]) -> None:
    for title in (
        "inject: tiny-llama, 4 layers, qv",
        "inject: tiny-llama, 3 layers, all-linear",
        "file: tiny-roberta, all-linear",
        "singular values: 40 × 40, rank 7",
    ):
        assert title in written[1]


def test_a_file_is_as_large_as_its_numbers_and_its_header(written: tuple[Path, str]) -> None:
    rows = [row for row in results.read(written[0])["rows"] if row["what"] == "file"]
    for row in rows:
        assert row["bytes"] == 4 * row["trainable"] + row["header_bytes"]
        plan = _plan(FilePoint(row["shape"], row["targets"]))
        is_ours = row["method"] == "msplora"
        assert row["trainable"] == (plan.parameters if is_ours else plan.lora_parameters)


def _plan(point: FilePoint) -> Any:
    model = size._model(point)
    return msplora.plan(model, msplora.MSPLoraConfig(r=8, target_modules=point.target_modules))


def test_both_ways_to_singular_values_agree() -> None:
    dense, factors = size.measure_values(ValuesPoint(40, 7), rounds=3)
    assert (dense["method"], factors["method"]) == ("dense", "factors")
    assert dense["times_faster"] is dense["max_relative_difference"] is None
    assert factors["max_relative_difference"] < 1e-10
    assert len(factors["times_faster"]) == 3


def test_every_injection_is_into_a_new_model_without_storage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    original = size.get_peft_model

    def watch(model: Any, config: Any) -> Any:
        assert not any("lora" in name for name, _ in model.named_modules())
        assert all(its.device.type == "meta" for its in model.parameters())
        adapted: Any = original(model, config)
        seen.append((config.peft_type, len(adapted.base_model.targeted_module_names)))
        return adapted

    monkeypatch.setattr(size, "get_peft_model", watch)
    size.measure_inject(InjectPoint("tiny-llama", "all-linear", 2), rounds=2)
    assert len(seen) == 3 * (2 + size.WARMUP)
    assert {count for _, count in seen} == {7 * 2}
    assert sum(kind == "MSPLORA" for kind, _ in seen) == 2 + size.WARMUP


def test_models_for_loading_share_their_weights() -> None:
    base = size._model(ROBERTA_QV)
    copied = size._copy(base)
    assert copied is not base
    assert [id(its) for its in copied.parameters()] == [id(its) for its in base.parameters()]


def test_all_linear_is_the_layers_of_the_blocks() -> None:
    point = FilePoint("tiny-roberta", "all-linear")
    assert {site.block is None for site in _plan(point).sites} == {False}
    assert len(_plan(point).sites) == 6 * 4
    llama = InjectPoint("tiny-llama", "all-linear", 2)
    with torch.device("meta"):
        model = size._model(llama, 2)
    config = msplora.MSPLoraConfig(target_modules=llama.target_modules)
    assert len(msplora.plan(model, config).sites) == 7 * 2


def test_a_file_is_continued_or_replaced_only_when_told(
    written: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written[0]
    before = json.loads(path.read_text())["rows"]
    with pytest.raises(MSPLoraError, match="--append, replace it with --force"):
        run("--output", path)
    for name in ("measure_inject", "measure_file", "measure_values"):
        monkeypatch.setattr(size, name, None)  # nothing is left to do
    run("--output", path, "--append")
    assert json.loads(path.read_text())["rows"] == before
    with pytest.raises(MSPLoraError, match=r"with rounds \[2\], asked for is 3"):
        run("--output", path, "--append", "--rounds", 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "llama-2-7"], "Did you mean 'llama-2-7b'"),
        (["--file-shape", "roberta"], "Did you mean"),
        (["--layers", 0], "layers is 0"),
        (["--side", 0], "side is 0"),
        (["--rank", -1], "rank is -1"),
        (["--append"], "--output"),
    ],
)
def test_bad_input_is_refused(arguments: list[Any], said: str) -> None:
    with pytest.raises(MSPLoraError, match=said):
        run(*arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--side", 10**6], "Lower --side or --rank"),
        (["--rank", 10**9], "Lower --side or --rank"),
        (["--layers", 10**7], "Lower --layers"),
        (["--file-shape", "llama-2-7b"], "Choose a smaller --file-shape"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_measured(
    arguments: list[Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fits, "available_bytes", lambda: 16 * 2**30)
    for name in ("measure_inject", "measure_file", "measure_values"):
        monkeypatch.setattr(size, name, None)
    with pytest.raises(MSPLoraError, match=said):
        run(*arguments)


def test_a_model_s_modules_take_less_than_is_foreseen() -> None:
    point = InjectPoint("llama-2-7b", "all-linear", 4)
    with torch.device("meta"):
        size._model(point, 1)  # what is imported and kept once
    tracemalloc.start()
    with torch.device("meta"):
        model = size._model(point, point.layers)
    adapted = get_peft_model(model, size._config("msplora", point))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert point.needed_bytes / 3 < taken < point.needed_bytes
    del adapted


def test_depths_are_measured_once_and_in_order() -> None:
    points = inject_points("tiny-llama", [8, 2, 4, 8])
    assert [(its.targets, its.layers) for its in points] == [
        ("qv", 4),
        *(("all-linear", layers) for layers in (2, 4, 8)),
    ]
