"""`msplora bench`, its result files and the script for a GPU: what is written, what refused."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from msplora.bench import gpu_figures, memory, methods, models, results, sites, speed, sweep
from msplora.bench.points import Point, site_points
from msplora.bench.stepping import make_step
from msplora.bench.sweep import run_sweep
from msplora.errors import MSPLoraError
from runs import msplora as command

TINY = ("--shape", "tiny-llama", "--layers", 2, "--batch", 2, "--length", 8, "--threads", 1)


@pytest.fixture(scope="module", autouse=True)
def _a_commit() -> Iterator[None]:
    """Measuring goes on in a checkout with changes, too, but not in one file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMMIT", "0123abc")
        yield


# refusals


def test_what_does_not_fit_is_refused_before_a_model_is_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for place in ("speed", "memory"):
        monkeypatch.setattr(f"msplora.bench.{place}.build_base", None)
    out = tmp_path / "out.json"
    huge = ("--shape", "tiny-llama", "--batch", 1, "--batch", 10**9, "--output", out)
    for arguments in (("speed", "--method", "full"), ("memory",)):
        result = command("bench", *arguments, *huge)
        assert result.code == 1
        assert "1000000000 × 128" not in result.error  # longer than the shape's positions
        result = command("bench", *arguments, *huge, "--length", 64)
        assert result.code == 1
        assert "1000000000 × 64 tokens" in result.error
        assert "GiB are free on this machine. Lower --batch" in result.error
        assert ("leave out the method full" in result.error) == (arguments[0] == "speed")
    result = command("bench", "sites", "--site", "10000000x10000000", "--output", out)
    assert "Lower --tokens" in result.error
    deep = command("bench", "speed", "--shape", "tiny-llama", "--layers", 10**9, "--length", 64)
    assert "1000000000 layers" in deep.error
    assert not out.exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "tiny-llama, 1 layer, qv, float32, 1 × 8 tokens ran out of memory. Lower"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory\n more"),
            "can't allocate memory",
        ),
    ],
)
def test_running_out_of_memory_says_what_to_lower(error: Exception, said: str) -> None:
    def measure(point: Any) -> Any:
        raise error

    told = []
    for point in (
        Point("tiny-llama", 1, "qv", "float32", 1, 8),
        *site_points(["8x8"], [4], ["float32"]),
    ):
        with pytest.raises(MSPLoraError, match="ran out of memory") as raised:
            run_sweep([point], measure, results.ResultFile(None, "speed"))
        told.append(str(raised.value))
        assert point.smaller in told[-1]
    assert said in told[0]


def test_a_file_that_cannot_be_written_is_refused_before_and_told_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # as root, who may write everywhere, would not see
        patch.setattr(results.os, "access", lambda path, mode: path != tmp_path)
        with pytest.raises(MSPLoraError, match="nothing may be added to"):
            results.check(tmp_path / "new" / "out.json")
    results.check(tmp_path / "new" / "out.json")
    (tmp_path / "new").write_text("")
    with pytest.raises(MSPLoraError, match=r"out\.json cannot be written"):
        results.write(tmp_path / "new" / "out.json", "speed", [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["speed", "--shape", "roberta-bse"], "Did you mean 'roberta-base'"),
        (["speed", "--targets", "all-liner"], "Did you mean 'all-linear'"),
        (["speed", "--dtype", "float23"], "Did you mean 'float32'"),
        (["speed", "--method", "mslora"], "Did you mean 'msplora'"),
        (["speed", "--checkpointing", "rentrant"], "Did you mean 'reentrant'"),
        (["speed", "--device", "cud"], "Did you mean 'cuda'"),
        (["speed", "--dropout", "1"], "below 1"),
        (["speed", "--batch", "0"], "at least 1"),
        (["speed", "--length", "513"], "512 positions"),
        (["speed", "--append"], "--output"),
        (["memory", "--method", "lroa"], "Did you mean 'lora'"),
        (["sites", "--method", "vera"], "There are: floor, lora"),
        (["sites", "--site", "768"], "INxOUT"),
        (["sites", "--dtype", "float23"], "Did you mean 'float32'"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], said: str) -> None:
    result = command("bench", *arguments)
    assert result.code == 1
    assert said in result.error


def test_help_and_refusals_do_not_wait_for_torch() -> None:
    script = (
        "import sys\n"
        "from msplora.cli.app import app\n"
        "from msplora.errors import MSPLoraError\n"
        "for verb in ([], ['speed'], ['memory'], ['sites']):\n"
        "    try:\n"
        "        app(['bench', *verb, '--help'])\n"
        "    except SystemExit as end:\n"
        "        assert not end.code\n"
        "for wrong in (['speed', '--shape', 'x'], ['memory', '--method', 'x'],\n"
        "              ['sites', '--site', 'x'], ['speed', '--device', 'x']):\n"
        "    try:\n"
        "        app(['bench', *wrong])\n"
        "        raise AssertionError\n"
        "    except MSPLoraError:\n"
        "        pass\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, capture_output=True)


# result files


def test_a_file_is_neither_lost_nor_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "made" / "speed.json"
    file = results.ResultFile(path, "speed")
    file.add([{"shape": "x", "method": "lora", "rounds": 3}])
    assert results.read(path)["rows"] == file.rows
    file.add([{"shape": "y", "method": "lora", "rounds": 3}])
    assert [row["shape"] for row in results.read(path)["rows"]] == ["x", "y"]
    assert [its.name for its in path.parent.iterdir()] == ["speed.json"]
    with pytest.raises(MSPLoraError, match="--append, replace it with --force"):
        results.ResultFile(path, "speed")
    with pytest.raises(MSPLoraError, match="say one"):
        results.ResultFile(path, "speed", append=True, force=True)
    replaced = results.ResultFile(path, "speed", force=True)
    assert len(results.read(path)["rows"]) == 2  # until there is something to replace it with
    replaced.add([])
    assert results.read(path)["rows"] == []
    for wrong, said in ((tmp_path, "is a folder"), (path / "below.json", "is not a folder")):
        with pytest.raises(MSPLoraError, match=said):
            results.check(wrong)


def test_a_continued_file_skips_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMIT", "abcdef0")
    path = tmp_path / "speed.json"
    results.ResultFile(path, "speed").add(
        [{"shape": "x", "batch": 1, "method": name, "rounds": 3} for name in ("floor", "lora")]
    )
    file = results.ResultFile(path, "speed", append=True)
    assert file.holds({"shape": "x", "batch": 1}, ["lora"], rounds=3)
    assert not file.holds({"shape": "x", "batch": 2}, ["lora"], rounds=3)
    with pytest.raises(MSPLoraError, match=r"has the point shape x, batch 1 without msplora"):
        file.holds({"shape": "x", "batch": 1}, ["lora", "msplora"])
    with pytest.raises(MSPLoraError, match=r"with rounds \[3\], asked for is 60"):
        file.holds({"shape": "x", "batch": 1}, ["lora"], rounds=60)
    file.add([{"shape": "x", "batch": 2, "method": "lora", "rounds": 3}])
    assert len(results.read(path)["rows"]) == 3
    first = results.read(path)["command"]
    for argv in (["msplora", "b"], ["msplora", "c"], ["msplora", "b"]):  # stopped, and gone on with
        monkeypatch.setattr(sys, "argv", argv)
        results.ResultFile(path, "speed", append=True).add([])
    assert results.read(path)["command"] == f"{first} && msplora b && msplora c"
    with pytest.raises(MSPLoraError, match="kind is 'speed' there and 'memory' here"):
        results.ResultFile(path, "memory", append=True)
    monkeypatch.setenv("COMMIT", "fedcba9")
    with pytest.raises(MSPLoraError, match="commit is 'abcdef0' there and 'fedcba9' here"):
        results.ResultFile(path, "speed", append=True)
    monkeypatch.setenv("COMMIT", "abcdef0-dirty")
    results.ResultFile(tmp_path / "dirty.json", "speed").add([])
    with pytest.raises(MSPLoraError, match="abcdef0-dirty, and changes that are not committed"):
        results.ResultFile(tmp_path / "dirty.json", "speed", append=True)


def test_what_is_no_result_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(MSPLoraError, match="there is no file"):
        results.read(path)
    for content in ("{", "[]", '{"kind": "speed"}', '{"kind": "other", "rows": []}'):
        path.write_text(content)
        with pytest.raises(MSPLoraError, match="is not a result file"):
            results.read(path)


# the command


def test_speed_writes_rows_with_their_origin(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    options = (*TINY, "--rounds", 2, "--warmup", 1, "--method", "msplora", "--output", out)
    shown = command("bench", "speed", *options)
    assert shown.code == 0, shown.err
    assert "to LoRA" in shown.out
    content = results.read(out)
    assert content["command"].startswith("msplora bench speed --shape tiny-llama")
    assert str(tmp_path) not in content["command"]
    assert {"commit", "hardware", "versions", "threads"} <= content.keys()
    assert (content["kind"], content["threads"]) == ("speed", 1)
    assert {"torch", "transformers", "peft", "python", "msplora"} <= content["versions"].keys()
    assert [row["method"] for row in content["rows"]] == ["floor", "lora", "msplora"]
    point = Point("tiny-llama", 2, "qv", "float32", 2, 8)
    for row in content["rows"]:
        assert {key: row[key] for key in point.keys()} == point.keys()  # noqa: SIM118
        assert row["rounds"] == 2
        for key in ("seconds", "to_floor", "to_lora"):
            assert row[key] == sorted(row[key])
            assert len(row[key]) == 3
    refused = command("bench", "speed", *options)
    assert refused.code == 1
    assert "--append" in refused.error
    before = out.read_bytes()
    assert command("bench", "speed", *options, "--append").code == 0
    assert json.loads(before)["rows"] == results.read(out)["rows"]  # it was there: not again
    assert command("bench", "speed", *options, "--append", "--batch", 3).code == 0
    assert [row["batch"] for row in results.read(out)["rows"]] == [2, 2, 2, 3, 3, 3]


@pytest.mark.slow
def test_memory_measures_each_method_in_a_process_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    shown = command("bench", "memory", *TINY, "--method", "msplora", "--output", out)
    assert shown.code == 0, shown.err
    (row,) = results.read(out)["rows"]
    point = Point("tiny-llama", 2, "qv", "float32", 2, 8)
    step = make_step("msplora", models.build_base(point), point)
    step()
    assert row["step_live_bytes"] == memory.peak_live_bytes(step)
    # Weights, and two moments and a step count of each tensor that trains.
    kept = 4 * sum(its.numel() for its in step.model.parameters())
    kept += sum(2 * its.nbytes + 4 for its in step.parameters)
    kept += sum(its.nbytes for its in step.model.buffers())
    assert row["peak_live_bytes"] == kept + row["step_live_bytes"]
    assert row["trainable"] == step.trainable
    assert row["resident_bytes"] > 50e6


def test_sites_writes_rows(tmp_path: Path) -> None:
    out = tmp_path / "sites.json"
    options = ("--site", "32x48", "--tokens", 16, "--rounds", 2, "--threads", 1, "--output", out)
    assert command("bench", "sites", *options).code == 0
    rows = results.read(out)["rows"]
    assert [row["method"] for row in rows] == list(methods.SITE_METHODS)
    assert rows[0].keys() == {
        "in", "out", "tokens", "dtype", "method", "rounds", "seconds", "to_floor", "to_lora",
    }  # fmt: skip


def test_a_site_s_step_leaves_no_gradient_behind() -> None:
    (point,) = site_points(["32x48"], [4], ["float32"])
    weight = torch.nn.Linear(32, 48).requires_grad_(False)
    for name in methods.SITE_METHODS:
        step = sites.make_site_step(name, weight, point)
        step()
        assert step.x.grad is None
        assert all(its.grad is None for its in step.parameters)
        sizes = {"floor": 0, "lora": 8, "lora-again": 8}
        wanted = sizes.get(name, 14) * (32 + 48)
        assert sum(its.numel() for its in step.parameters) == wanted


# a GPU


def gpu_script() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module
    spec.loader.exec_module(module)
    return module


def test_a_batch_that_is_too_large_is_halved_and_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, out = gpu_script(), tmp_path / "gpu.json"
    asked: list[int] = []

    def measured(point: Point, names: Any, *_: Any, **__: Any) -> list[dict[str, Any]]:
        asked.append(point.batch)
        if point.batch == 4:
            raise gpu_figures.TooFullError("no room")
        return [{**point.keys(), "method": name} for name in names]

    monkeypatch.setattr(script, "measure_speed", measured)
    file = results.ResultFile(out, "speed")
    plan = script.tiny_plan("float32")

    def run(batch: int) -> list[dict[str, Any]]:
        point = Point("tiny-llama", 2, "qv", "float32", batch, 16)
        return script.measure(plan, point, ["lora"], file, math.inf, math.inf)

    rows = run(4)
    assert [row["batch"] for row in rows] == [2]
    file.add(rows)
    assert run(4) == []  # on another day the estimate is wrong again
    assert asked == [4, 2, 4]


@pytest.mark.thorough
def test_the_gpu_script_goes_its_way_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, out = gpu_script(), tmp_path / "gpu.json"
    script.main(["--tiny", "--output", str(out), "--methods", "floor", "lora", "msplora"])
    shown = capsys.readouterr().out
    assert "skipped" not in shown
    rows = results.read(out)["rows"]
    assert [(row["targets"], row["compiled"]) for row in rows[::3]] == [
        ("qv", False),
        ("all-linear", False),
        ("qv", True),
    ]
    assert {row["batch"] for row in rows if row["targets"] == "qv"} == {2}  # the most there may be
    again = ["--tiny", "--output", str(out), "--methods", "floor", "lora", "msplora", "--append"]
    script.main(again)
    assert capsys.readouterr().out == ""
    assert results.read(out)["rows"] == rows
    script.main(["--tiny", "--minutes", "0", "--output", str(out), "--force"])
    assert capsys.readouterr().out.count("skipped: tiny-llama") == 3
    script.main(["--tiny", "--minutes", "0", "--output", str(out), "--force", "--only", "all-lin"])
    assert capsys.readouterr().out.count("skipped: tiny-llama") == 1
    with pytest.raises(SystemExit):
        script.main(["--tiny", "--output", str(out), "--force", "--only", "7b"])
    assert "no point is named '7b': tiny-llama" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["--tiny", "--output", str(out)])


def test_the_gpu_script_keeps_to_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    script = gpu_script()
    monkeypatch.setattr(script.time, "monotonic", lambda: 100.0)

    def watch(until: float, deadline: float = 1000.0) -> Any:
        return script.Watch((5, 60), until, deadline)

    # All rounds that a verdict takes where most of them fit, and then to the last of them.
    assert [watch(130.0).rounds(last) for last in (0.1, 0.6, 1.0, 100.0)] == [60, 60, 30, 5]
    going_on = [watch(99.0).go_on(kept) for kept in (0, 4, 5, 47, 48)]
    assert going_on == [True, True, False, False, True]
    late = watch(99.0, deadline=99.5)
    assert not late.go_on(48)
    late.on_step()  # what is kept is not thrown away
    late.go_on(4)
    with pytest.raises(script.OutOfTimeError):
        late.on_step()


def test_the_gpu_script_s_points_share_its_time() -> None:
    script = gpu_script()
    plan = script.gpu_plan("bfloat16")
    assert {its.point.shape for its in plan.wanted} == {"llama-3.2-3b", "llama-2-7b"}
    assert {its.point.targets for its in plan.wanted if its.point.compiled} == {"all-linear", "qv"}
    left = 7.0 * 60
    given = []
    for place, wanted in enumerate(plan.wanted):
        seconds = script.seconds_for(plan, place, left)
        if left < wanted.least:
            break
        assert seconds >= wanted.least
        assert seconds <= left or place == len(plan.wanted) - 1
        given.append(seconds)
        left -= seconds
    # What a verdict is wanted of has a minute beside what it takes to get ready.
    assert min(given[:4]) > 15 + 30


def test_the_gpu_script_measures_no_code_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = gpu_script()
    monkeypatch.setenv("COMMIT", "0123abc-dirty")
    with pytest.raises(SystemExit):
        script.main(["--output", str(tmp_path / "gpu.json")])
    assert "the commit is 0123abc-dirty" in capsys.readouterr().err


def test_a_full_gpu_ends_a_point_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    retries = iter((0, 0, 2))
    monkeypatch.setattr(speed, "allocation_retries", lambda device: next(retries))
    point = Point("tiny-llama", 1, "qv", "float32", 1, 8)
    with pytest.raises(gpu_figures.TooFullError) as caught:
        speed.measure_speed(point, ["msplora"], 50, warmup=1)
    assert sweep.is_out_of_memory(caught.value)
    assert next(retries, None) is None  # in the third round, not in the last


@pytest.mark.parametrize(
    "said",
    [
        "DefaultCPUAllocator: can't allocate memory",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_memory_that_runs_out_is_known_by_its_words(said: str) -> None:
    assert sweep.is_out_of_memory(RuntimeError(said))
    assert not sweep.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_the_script_of_all_measurements_refuses_changes_that_are_not_committed(
    tmp_path: Path,
) -> None:
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "cpu.sh"
    environment = os.environ | {"COMMIT": "0123abc-dirty", "OUT": str(tmp_path / "out")}
    environment["BIN"] = str(Path(sys.executable).parent)
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "The code here is 0123abc-dirty: commit" in done.stderr
    assert not (tmp_path / "out").exists()


def test_launches_are_those_of_kernels() -> None:
    calls = [("cudaLaunchKernel", 7), ("cuLaunchKernelEx", 2), ("cudaMemcpyAsync", 5), ("mm", 9)]
    calls.append(("cuLaunchCooperativeKernel", 1))
    assert gpu_figures.launches(calls) == 10
