"""A sweep runs what is missing and only that, and its table says what its rows say.

Where only the bookkeeping counts, a run is replaced by one that writes the metrics of a known
function of its settings.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import transformers as hf
import yaml

from msplora.sweep import running
from msplora.sweep import sweep as sweep_module
from msplora.sweep.folder import SweepFolderError
from msplora.sweep.naming import run_name
from msplora.sweep.plot import draw_sweep
from msplora.sweep.reading import Sweep, make_sweep
from msplora.sweep.rows import Row, Rows
from msplora.sweep.running import Outcome, SweepSignals, run_apart
from msplora.sweep.sweep import TooMany, run_sweep
from msplora.train.progress import ShowProgress
from msplora.train.settings import Settings
from msplora.train.settings_file import make_settings, read_content
from msplora.train.stopping import Interrupted
from runs import (
    Result,
    answered_rows,
    msplora,
    same,
    save_decoder,
    tensors,
    tree,
    write_config,
    write_jsonl,
)

RATE = "training.learning_rate"
BASE: dict[str, Any] = {
    "model": "decoder",
    "task": "sft",
    "data": {"train": "answered.jsonl", "validation_fraction": 0.2},
    "training": {"max_steps": 3, "batch_size": 4, "logging_steps": 1, "check_saved": False},
}

PAIRS: dict[str, Any] = {**BASE, "task": "dpo", "data": {"train": "pairs.jsonl"}}
LABELLED: dict[str, Any] = {**BASE, "task": "classification", "data": {"train": "rows.csv"}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    save_decoder(folder / "decoder")
    # A model with LayerNorm, so that a rate too high is seen: RMSNorm turns infinities into zeros.
    shape = {"n_layer": 4, "n_embd": 16, "n_head": 2, "vocab_size": 64, "n_positions": 64}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    hf.GPT2LMHeadModel(hf.GPT2Config(**shape, **ends)).save_pretrained(folder / "decoder")
    write_jsonl(folder / "answered.jsonl", answered_rows(20))
    return folder


@pytest.fixture
def here(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model and its rows."""
    for name in ("decoder", "answered.jsonl"):
        (tmp_path / name).symlink_to(bases / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sweep_of(**content: Any) -> Sweep:
    return make_sweep({"output": "out", "config": BASE, "isolate": False, **content}, "sweep.yaml")


def sweep_command(content: dict[str, Any], *flags: object) -> Result:
    whole = {"output": "out", "config": BASE, "isolate": False, **content}
    return msplora("sweep", write_config(Path("sweep.yaml"), whole), *flags)


def rows_in(folder: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]


def table_in(folder: str = "out") -> list[dict[str, str]]:
    return list(csv.DictReader(Path(folder, "table.csv").read_text().splitlines()))


class MadeUp:
    """In the place of training: a loss that is least at the rate 1e-3, rank 16 and an odd seed."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.stop_at: int | None = None
        self.fails: set[float] = set()
        self.fails_once: set[str] = set()
        self.is_killed: set[str] = set()
        """Runs whose process somebody ends once."""
        self.diverges_above = math.inf
        self.scored_on: Callable[[Settings], dict[str, int | None] | None] = lambda _: None

    def __call__(self, settings: Settings, log: Path, *_: Any) -> Outcome:
        run = Path(settings.output)
        rate = settings.training.learning_rate
        if len(self.ran) == self.stop_at:
            self.stop_at = None
            raise KeyboardInterrupt
        self.ran.append(run.name)
        if run.name in self.is_killed:
            self.is_killed.remove(run.name)
            return Outcome("unfinished", 1.0, "its process was ended by SIGKILL")
        if run.name in self.fails_once:
            self.fails_once.remove(run.name)
            return Outcome("failed", 1.0, "out of memory")
        if rate in self.fails:
            return Outcome("failed", 1.0, "out of memory")
        if rate > self.diverges_above:
            return Outcome("diverged", 1.0, "the training loss is nan")
        loss = math.log10(rate / 1e-3) ** 2 + 16 / (settings.adapter.r or 8) + settings.seed % 2 / 8
        run.mkdir(parents=True)
        best = {"step": 3, "epoch": 1.0, "loss": loss}
        metrics = {"metric_for_best": "loss", "best": best, "before": None, "trainable": 7}
        metrics["evaluations"], metrics["scored_on"] = [best], self.scored_on(settings)
        (run / "metrics.json").write_text(json.dumps(metrics))
        (run / "config.yaml").write_text("")
        (run / "versions.json").write_text("{}")
        (run / "log_history.json").write_text("[]")
        return Outcome("complete", 1.0)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MadeUp:
    monkeypatch.chdir(tmp_path)
    run = MadeUp()
    monkeypatch.setattr(sweep_module, "run_here", run)
    return run


def test_each_run_is_the_one_that_train_makes_and_one_that_diverges_is_recorded(
    here: Path,
) -> None:
    result = sweep_command({"grid": {RATE: [0.01, 1e30]}, "seeds": [2]})
    assert result.code == 0, result.err
    rows = rows_in()
    assert [(row["parameters"][RATE], row["seed"], row["status"]) for row in rows] == [
        (0.01, 2, "complete"),
        (1e30, 2, "diverged"),
    ]
    assert "is nan" in rows[1]["error"]
    name = "learning_rate=0.01,seed=2"
    assert [path.name for path in Path("out/runs").iterdir()] == [name]
    alone = msplora(
        "train", write_config(Path("one.yaml"), {**BASE, "output": "alone", "seed": 2}),
        "--set", f"{RATE}=0.01",
    )  # fmt: skip
    assert alone.code == 0, alone.err
    assert same(tensors(Path("alone/adapter")), tensors(Path("out/runs", name, "adapter")))
    metrics = json.loads(Path("alone/metrics.json").read_text())
    assert rows[0]["value"] == metrics["best"]["loss"]
    assert rows[0]["best"] == metrics["best"]
    assert rows[0]["scored_on"] == metrics["scored_on"]
    assert metrics["scored_on"]["rows"] == 4
    assert metrics["scored_on"]["tokens"] == metrics["before"]["tokens"]
    assert rows[0]["trainable"] == metrics["trainable"]
    assert "| 1e+30 | – | – | – | diverged |" in Path("out/table.md").read_text()
    assert Path("out/sweep.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on_to_the_same_rows(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = {"grid": {RATE: [0.01, 0.02]}}
    assert sweep_command({"grid": {RATE: [0.02]}, "output": "straight"}).code == 0
    usual = ShowProgress.on_step_end
    pressed: list[float] = []

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        usual(self, args, state, control, **more)
        if state.global_step == 2 and args.learning_rate == 0.02 and not pressed:
            pressed.append(state.global_step)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ShowProgress, "on_step_end", on_step_end)
    stopped = sweep_command(grid)
    assert stopped.code == 143
    assert "To go on: msplora sweep" in stopped.error
    assert [row["status"] for row in rows_in()] == ["complete", "unfinished"]
    first = tree(Path("out/runs/learning_rate=0.01"))
    command = stopped.error.partition("To go on: msplora ")[2].split()
    result = msplora(*command)
    assert result.code == 0, result.err
    assert "learning_rate=0.01\n" not in result.out  # nothing was run twice
    assert "goes on after step 2" in Path("out/logs/learning_rate=0.02.log").read_text()
    assert tree(Path("out/runs/learning_rate=0.01")) == first
    assert [row["status"] for row in rows_in()] == ["complete", "complete"]
    assert rows_in()[1]["best"] == rows_in("straight")[0]["best"]
    again = sweep_command(grid)
    assert again.code == 0
    assert "[" not in again.out  # no run


def test_the_table_has_the_means_of_the_rows_best_first(made_up: MadeUp) -> None:
    made_up.diverges_above = 5e-3
    content = {"grid": {"method": ["msplora", "lora"], RATE: [1e-4, 1e-3, 1e-2]}, "seeds": [0, 1]}
    run_sweep(sweep_of(**content))
    assert len(made_up.ran) == len(set(made_up.ran)) == 12
    assert made_up.ran[0] == "method=msplora,learning_rate=0.0001,seed=0"
    table, rows = table_in(), rows_in()
    for line in table:
        values = [
            row["value"]
            for row in rows
            if row["parameters"] == {"method": line["method"], RATE: float(line[RATE])}
            and row["status"] == "complete"
        ]
        assert int(line["runs"]) == len(values)
        assert int(line["runs"]) + int(line["diverged"]) == 2
        if values:
            assert float(line["mean"]) == pytest.approx(mean(values))
            assert (float(line["lowest"]), float(line["highest"])) == (min(values), max(values))
    means = [float(line["mean"]) for line in table if line["mean"]]
    assert means == sorted(means)  # of a loss, the lowest first
    marks = {(line["method"], line[RATE]): line["mark"] for line in table if line["mark"]}
    assert marks == {("msplora", "0.001"): "best", ("lora", "0.001"): "best lora"}
    assert "| msplora | 0.001 | 2.0625 (2.0000 to 2.1250) | 7 | 1 | best |" in (
        Path("out/table.md").read_text()
    )


def test_a_setting_that_diverged_with_one_seed_is_never_the_best(made_up: MadeUp) -> None:
    run_sweep(sweep_of(grid={RATE: [1e-3, 2e-3]}, seeds=[0, 2]))
    rows = [json.dumps(row) for row in rows_in()]
    one = {**rows_in()[0], "status": "diverged", "value": None}
    Path("out/results.jsonl").write_text("\n".join([json.dumps(one), *rows[1:]]) + "\n")
    run_sweep(sweep_of(grid={RATE: [1e-3, 2e-3]}, seeds=[0, 2]))
    assert [(line[RATE], line["mark"]) for line in table_in()] == [("0.002", "best"), ("0.001", "")]


def tokens_by_what_counts(settings: Settings) -> dict[str, int | None]:
    tokens = 639 if settings.training.completion_only_loss else 2004
    return {"rows": 20, "checksum": 1, "tokens": tokens + settings.seed}


COUNTS = "training.completion_only_loss"


def test_the_best_is_marked_among_settings_that_were_scored_on_the_same(made_up: MadeUp) -> None:
    made_up.scored_on = tokens_by_what_counts
    run_sweep(sweep_of(grid={COUNTS: [True, False], RATE: [1e-2, 1e-3]}, seeds=[0, 1]))
    marks = {(line[COUNTS], line[RATE]): line["mark"] for line in table_in()}
    assert marks == {
        ("true", "0.001"): "best of those scored alike",
        ("false", "0.001"): "best of those scored alike",
        ("true", "0.01"): "",
        ("false", "0.01"): "",
    }
    said = "Its settings were scored on 639 and 2,004 tokens: not comparable"
    assert said in Path("out/table.md").read_text()
    # Seeds hold out other rows, each setting the same ones.
    run_sweep(sweep_of(grid={RATE: [1e-2, 1e-3]}, seeds=[0, 1], output="alike"))
    assert [line["mark"] for line in table_in("alike")] == ["best", ""]
    assert "comparable" not in Path("alike/table.md").read_text()


def test_a_setting_that_is_compared_with_none_is_not_marked_and_its_run_is_kept(
    undrawn: MadeUp,
) -> None:
    undrawn.scored_on = tokens_by_what_counts
    run_sweep(sweep_of(grid={COUNTS: [True, False]}, keep="best"))
    assert [line["mark"] for line in table_in()] == ["", ""]
    assert len(list(Path("out/runs").iterdir())) == 2


def test_rows_that_differ_are_told_apart_where_they_are_as_many(undrawn: MadeUp) -> None:
    def other_rows(settings: Settings) -> dict[str, int | None]:
        return {"rows": 20, "checksum": len(str(settings.data.train)), "tokens": None}

    for name in ("answered", "others"):
        write_jsonl(Path(f"{name}.jsonl"), answered_rows(20))
    undrawn.scored_on = other_rows
    grid = {"data.train": ["answered.jsonl", "others.jsonl"]}
    run_sweep(sweep_of(grid=grid))
    assert "scored on rows that differ: not comparable" in Path("out/table.md").read_text()


def test_of_older_runs_the_tokens_are_compared(undrawn: MadeUp) -> None:
    content = {"grid": {COUNTS: [True, False]}}
    run_sweep(sweep_of(**content))
    assert "comparable" not in Path("out/table.md").read_text()
    rows = rows_in()
    for row, tokens in zip(rows, (639, 2004), strict=True):
        del row["scored_on"]
        row["best"]["tokens"] = tokens
    Path("out/results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_sweep(sweep_of(**content))
    assert "scored on 639 and 2,004 tokens: not comparable" in Path("out/table.md").read_text()


def test_a_sweep_with_a_run_that_failed_or_none_complete_exits_with_1(undrawn: MadeUp) -> None:
    undrawn.fails, undrawn.diverges_above = {1e-3}, 1e-1
    result = sweep_command({"grid": {RATE: [1e-3, 1e-2]}})
    assert result.code == 1
    assert "1 of 2 failed; --retry-failed runs them again. The first for: out of memory" in (
        result.out
    )
    assert sweep_command({"grid": {RATE: [1e-3]}, "output": "all"}).code == 1
    diverged = sweep_command({"grid": {RATE: [1.0]}, "output": "diverged"})
    assert (diverged.code, "No run is complete." in diverged.out) == (1, True)
    assert sweep_command({"grid": {RATE: [1e-3, 1e-2]}}, "--list").code == 0
    undrawn.fails.clear()
    assert sweep_command({"grid": {RATE: [1e-3, 1e-2]}}, "--retry-failed").code == 0


def test_a_run_that_somebody_ended_goes_on_at_the_next_start(undrawn: MadeUp) -> None:
    undrawn.is_killed = {"learning_rate=0.001"}
    content = {"grid": {RATE: [1e-3, 1e-2]}}
    result = sweep_command(content)
    assert result.code == 1
    assert "1 of 2 were ended from outside; the same command goes on." in result.out
    assert [row["status"] for row in rows_in()] == ["unfinished", "complete"]
    assert sweep_command(content).code == 0
    assert [row["status"] for row in rows_in()] == ["complete", "complete"]


def test_a_full_disk_is_told_of_and_loses_nothing(
    undrawn: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Rows.put

    def full(rows: Rows, row: Row) -> None:
        if row.status == "complete":
            raise OSError(errno.ENOSPC, "No space left on device")
        put(rows, row)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "put", full)
        with pytest.raises(SweepFolderError, match=r"No space left.*give the same command again"):
            run_sweep(sweep_of(grid={RATE: [1e-3]}))


def test_names_are_no_longer_than_a_file_system_takes() -> None:
    for letter in "aä数":
        first = run_name({"data.train": letter * 300}, 0, ())
        second = run_name({"data.train": letter * 300}, 1, [first])
        assert first != second
        assert max(len(its.encode()) for its in (first, second)) < 130


def test_what_failed_is_run_again_on_demand_only(made_up: MadeUp) -> None:
    made_up.fails = {1e-3}
    content = {"grid": {RATE: [1e-3, 1e-2]}}
    run_sweep(sweep_of(**content))
    assert [row["status"] for row in rows_in()] == ["failed", "complete"]
    assert rows_in()[0]["error"] == "out of memory"
    made_up.ran.clear()
    made_up.fails.clear()
    run_sweep(sweep_of(**content))
    assert made_up.ran == []
    run_sweep(sweep_of(**content), retry_failed=True)
    assert made_up.ran == ["learning_rate=0.001"]
    assert [row["status"] for row in rows_in()] == ["complete", "complete"]


def test_a_changed_file_takes_over_the_runs_that_still_belong(made_up: MadeUp) -> None:
    run_sweep(sweep_of(grid={RATE: [1e-4, 1e-3]}))
    made_up.ran.clear()
    # The method was the default so far, and one rate is left out.
    run_sweep(sweep_of(grid={"method": ["msplora", "lora"], RATE: [1e-3, 1e-2]}))
    assert made_up.ran == [
        "method=msplora,learning_rate=0.01",
        "method=lora,learning_rate=0.001",
        "method=lora,learning_rate=0.01",
    ]
    assert {line[RATE] for line in table_in()} == {"0.001", "0.01"}
    made_up.ran.clear()
    run_sweep(sweep_of(grid={RATE: [1e-3]}, seeds=[42, 43]))  # 42 is the default
    assert made_up.ran == ["learning_rate=0.001,seed=43"]


def test_rates_in_quotes_are_drawn(made_up: MadeUp) -> None:
    run_sweep(sweep_of(grid={RATE: ["1e-3", "1e-2"]}))
    assert Path("out/sweep.png").is_file()
    assert read_content("out/sweep.yaml")["grid"][RATE] == ["1e-3", "1e-2"]


def test_a_search_without_a_row_is_drawn(made_up: MadeUp) -> None:
    search = {RATE: {"low": 1e-4, "high": 1e-2, "log": True}}
    draw_sweep(sweep_of(search=search, trials=3), [], Path("empty.png"))
    assert Path("empty.png").is_file()


def test_a_run_that_judged_nothing_has_failed(tmp_path: Path) -> None:
    metrics = {"metric_for_best": None, "best": {"step": 3}, "before": None, "trainable": 7}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics | {"evaluations": []}))
    for name, content in (("versions", "{}"), ("log_history", "[]")):
        (tmp_path / f"{name}.json").write_text(content)
    row = Row("a", {}, None, "unfinished", {})
    row.read_run(tmp_path)
    assert (row.status, row.value) == ("failed", None)
    assert "held out no rows" in str(row.error)


def test_another_base_config_is_refused_with_what_differs(made_up: MadeUp) -> None:
    run_sweep(sweep_of(grid={RATE: [1e-3]}))
    before = tree(Path("out"))
    training = {**BASE["training"], "max_steps": 9}
    with pytest.raises(SweepFolderError, match=r"training\.max_steps was 3 and is 9"):
        run_sweep(sweep_of(grid={RATE: [1e-3]}, config={**BASE, "training": training}))
    assert tree(Path("out")) == before
    Path("other").mkdir()
    Path("other/notes.txt").write_text("mine")
    with pytest.raises(SweepFolderError, match="is not empty and holds no sweep"):
        run_sweep(sweep_of(grid={RATE: [1e-3]}, output="other"))


@pytest.fixture
def undrawn(made_up: MadeUp, monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    """Without the plot, which takes most of a second."""
    monkeypatch.setattr("msplora.sweep.plot.draw_sweep", lambda *_: None)
    return made_up


def test_results_of_other_data_are_not_put_into_one_table(undrawn: MadeUp) -> None:
    rows = write_jsonl(Path("answered.jsonl").absolute(), answered_rows(20))
    undrawn.fails = {1e-2}
    run_sweep(sweep_of(grid={RATE: [1e-3, 1e-2]}))
    write_jsonl(rows, answered_rows(20))  # the same again
    run_sweep(sweep_of(grid={RATE: [1e-3, 1e-2]}))
    before = tree(Path("out"))
    write_jsonl(rows, answered_rows(21))
    for more in ([1e-4], []):  # whether or not there is a new run
        with pytest.raises(SweepFolderError, match="other content of") as refused:
            run_sweep(sweep_of(grid={RATE: [1e-3, 1e-2, *more]}))
        assert str(rows) in str(refused.value)
    assert tree(Path("out"))["results.jsonl"] == before["results.jsonl"]
    # One that failed has no result, and may have failed for what was in the file.
    undrawn.fails.clear()
    run_sweep(sweep_of(grid={RATE: [1e-2]}), retry_failed=True)
    assert rows_in()[1]["status"] == "complete"


@pytest.mark.parametrize("has_begun", [False, True])
def test_data_that_changed_under_an_unfinished_run_are_refused_before_it_goes_on(
    has_begun: bool, undrawn: MadeUp
) -> None:
    rows = write_jsonl(Path("answered.jsonl").absolute(), answered_rows(20))
    undrawn.stop_at = 0
    with pytest.raises(Interrupted):
        run_sweep(sweep_of(grid={RATE: [1e-3]}))
    if has_begun:
        Path("out/runs/learning_rate=0.001.unfinished/checkpoints/checkpoint-1").mkdir(parents=True)
    write_jsonl(rows, answered_rows(21))
    if has_begun:
        with pytest.raises(SweepFolderError, match="other content of"):
            run_sweep(sweep_of(grid={RATE: [1e-3]}))
        assert rows_in()[0]["status"] == "unfinished"
        return
    run_sweep(sweep_of(grid={RATE: [1e-3]}))  # nothing was made of the old ones
    assert rows_in()[0]["status"] == "complete"


def test_what_a_failed_run_left_of_other_data_is_out_of_the_way(undrawn: MadeUp) -> None:
    rows = write_jsonl(Path("answered.jsonl").absolute(), answered_rows(20))
    undrawn.fails_once = {"learning_rate=0.001"}
    run_sweep(sweep_of(grid={RATE: [1e-3]}))
    left = Path("out/runs/learning_rate=0.001.unfinished")
    left.mkdir()
    (left / "config.yaml").write_text("a run")
    write_jsonl(rows, answered_rows(21))
    run_sweep(sweep_of(grid={RATE: [1e-3]}), retry_failed=True)
    assert not left.exists()
    assert rows_in()[0]["status"] == "complete"


def test_data_that_change_while_a_sweep_runs_stop_it(
    undrawn: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_jsonl(Path("answered.jsonl"), answered_rows(20))

    def run(*arguments: Any) -> Outcome:
        write_jsonl(rows, answered_rows(21))
        return undrawn(*arguments)

    monkeypatch.setattr(sweep_module, "run_here", run)
    with pytest.raises(SweepFolderError, match="other content of"):
        run_sweep(sweep_of(grid={RATE: [1e-3, 1e-2]}))
    assert undrawn.ran == ["learning_rate=0.001"]


def test_rows_without_a_checksum_are_kept_and_said_to_have_none(undrawn: MadeUp) -> None:
    rows = write_jsonl(Path("answered.jsonl"), answered_rows(20))
    sweep_command({"grid": {RATE: [1e-3]}})
    _as_before(Path("out"))
    write_jsonl(rows, answered_rows(21))
    result = sweep_command({"grid": {RATE: [1e-3, 1e-2]}})
    assert result.code == 0, result.err
    assert "1 runs are of an older msplora" in result.out + result.err
    assert undrawn.ran == ["learning_rate=0.001", "learning_rate=0.01"]


def _as_before(folder: Path) -> None:
    """Rows, and the sweep's file, as they were written when paths stood as in the config."""
    rows = rows_in(str(folder))
    for row in rows:
        del row["inputs"]
        row["config"]["data.train"] = "answered.jsonl"
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = yaml.safe_load((folder / "sweep.yaml").read_text())
    content["output"], content["config"] = "out", BASE
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))


def test_a_sweep_goes_on_from_any_folder(
    undrawn: MadeUp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("answered", "others"):
        write_jsonl(Path(f"{name}.jsonl"), answered_rows(20))
    grid = {"data.train": ["answered.jsonl", "others.jsonl"], RATE: [1e-3]}
    undrawn.stop_at = 1
    assert sweep_command({"grid": grid}).code == 130
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = msplora("sweep", tmp_path / "out/sweep.yaml")
    assert result.code == 0, result.err
    assert len(undrawn.ran) == 2
    assert not list(Path().iterdir())
    monkeypatch.chdir(tmp_path)
    assert sweep_command({"grid": grid}).code == 0
    assert len(undrawn.ran) == 2
    assert {row["config"]["data.train"] for row in rows_in()} == {
        str(tmp_path / "answered.jsonl"),
        str(tmp_path / "others.jsonl"),
    }


def test_a_search_among_files_ends(undrawn: MadeUp) -> None:
    for name in ("answered", "others"):
        write_jsonl(Path(f"{name}.jsonl"), answered_rows(20))
    choices = ["answered.jsonl", "others.jsonl"]
    held_out = str(write_jsonl(Path("held-out.jsonl"), answered_rows(5)))
    config = {**BASE, "data": {"train": "answered.jsonl", "validation": held_out}}
    run_sweep(sweep_of(config=config, search={"data.train": {"choices": choices}}, trials=5))
    assert len(undrawn.ran) == 2


SEARCH = {RATE: {"low": 1e-5, "high": 1e-1, "log": True}, "adapter.r": {"choices": [4, 8, 16]}}


def test_a_search_that_is_stopped_tries_what_it_would_have_tried(made_up: MadeUp) -> None:
    run_sweep(sweep_of(search=SEARCH, trials=12, seeds=[0, 1], output="straight"))
    straight = rows_in("straight")
    assert len(straight) == 24
    assert len({row["parameters"][RATE] for row in straight}) == 12
    for stop_at in (3, 20):  # within the first settings, and among those that are chosen
        made_up.ran.clear()
        made_up.stop_at = stop_at
        content = {"search": SEARCH, "trials": 12, "seeds": [0, 1], "output": f"out{stop_at}"}
        with pytest.raises(Interrupted):
            run_sweep(sweep_of(**content))
        run_sweep(sweep_of(**content))
        assert len(made_up.ran) == len(set(made_up.ran)) == 24
        assert rows_in(f"out{stop_at}") == straight
    found = table_in("straight")[0]
    assert found["adapter.r"] == "16"
    assert 1e-4 < float(found[RATE]) < 1e-2


def test_a_search_is_one_for_each_combination_and_takes_over_what_lies_in_its_range(
    made_up: MadeUp,
) -> None:
    made_up.diverges_above, made_up.fails = 1e-2, set()
    content: dict[str, Any] = {"grid": {"method": ["msplora", "lora"]}, "search": SEARCH}
    run_sweep(sweep_of(**content, trials=4))
    assert sum(name.startswith("method=lora") for name in made_up.ran) == 4
    made_up.ran.clear()
    run_sweep(sweep_of(**content, trials=6))
    assert len(made_up.ran) == 4
    made_up.ran.clear()
    content["search"] = {**SEARCH, RATE: {"low": 1e-5, "high": 1e-3, "log": True}}
    inside = [row for row in rows_in() if row["parameters"][RATE] <= 1e-3]
    assert 0 < len(inside) < 12
    run_sweep(sweep_of(**content, trials=6))
    assert len(made_up.ran) == 12 - len(inside)


def test_a_search_among_numbers_in_quotes_ends(undrawn: MadeUp) -> None:
    for key, choices in ((RATE, ["1e-4", "1e-3"]), ("adapter.r", ["4", 8])):
        undrawn.ran.clear()
        run_sweep(sweep_of(search={key: {"choices": choices}}, trials=5, output=key))
        assert len(undrawn.ran) == 2


def test_a_search_whose_runs_are_not_known_again_ends(
    undrawn: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msplora.sweep.settings_tried.searched_values", lambda *_: None)
    run_sweep(sweep_of(search={RATE: {"choices": [1e-4, 1e-3]}}))
    assert len(undrawn.ran) == 1


def test_what_is_swept_need_not_be_in_the_base(undrawn: MadeUp) -> None:
    for name in ("answered", "others"):
        write_jsonl(Path(f"{name}.jsonl"), answered_rows(20))
    config = {key: its for key, its in BASE.items() if key != "model"}
    config["data"] = {"validation_fraction": 0.2}
    grid = {"data.train": ["answered.jsonl", "others.jsonl"], "model": ["a"]}
    run_sweep(sweep_of(config=config, grid=grid))
    run_sweep(sweep_of(config=config, grid={**grid, "model": ["b"]}))
    assert len(undrawn.ran) == 4
    with pytest.raises(SweepFolderError, match=r"data.validation_fraction was 0.2 and is 0.3"):
        run_sweep(sweep_of(config={**config, "data": {"validation_fraction": 0.3}}, grid=grid))


def test_a_search_ends_where_there_is_nothing_else_to_try(made_up: MadeUp) -> None:
    content = {"search": {"adapter.lora_alpha": {"choices": [8, 16]}}, "trials": 5}
    run_sweep(sweep_of(**content))
    assert sorted(made_up.ran) == ["lora_alpha=16", "lora_alpha=8"]
    run_sweep(sweep_of(**content))
    assert len(made_up.ran) == 2


def test_only_the_best_runs_are_kept_where_that_is_asked_for(made_up: MadeUp) -> None:
    content = {
        "grid": {"method": ["msplora", "lora"], RATE: [1e-4, 1e-3, 1e-2]},
        "seeds": [0, 1],
        "keep": "best",
    }
    run_sweep(sweep_of(**content))
    kept = {
        f"method={method},learning_rate=0.001,seed={seed}"
        for method in ("msplora", "lora")
        for seed in (0, 1)
    }
    assert {path.name for path in Path("out/runs").iterdir()} == kept
    assert {row["name"] for row in rows_in() if row["kept"]} == kept
    assert len(table_in()) == 6
    made_up.ran.clear()
    run_sweep(sweep_of(**content))
    assert made_up.ran == []


@pytest.mark.parametrize("how", ["failed", "stopped"])
def test_the_runs_of_a_setting_that_may_still_be_the_best_are_kept(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The same command again makes its last seed, and with that the setting the best."""
    ended_early = []

    def run(settings: Settings, log: Path, *more: Any) -> Outcome:
        if not ended_early and Path(settings.output).name.startswith("learning_rate=0.001,seed=1"):
            ended_early.append(settings)
            if how == "failed":
                return Outcome("failed", 1.0, "out of memory")
            raise Interrupted("stopped", signal.SIGINT)
        return made_up(settings, log, *more)

    monkeypatch.setattr(sweep_module, "run_here", run)
    content = {"grid": {RATE: [1e-3, 1e-2]}, "seeds": [0, 1], "keep": "best"}
    with contextlib.suppress(Interrupted):
        run_sweep(sweep_of(**content))
    assert ended_early
    run_sweep(sweep_of(**content), retry_failed=True)
    kept = {f"learning_rate=0.001,seed={seed}" for seed in (0, 1)}
    assert {path.name for path in Path("out/runs").iterdir()} == kept


def test_a_list_runs_nothing(made_up: MadeUp) -> None:
    sweep = {"grid": {RATE: [1e-3, 1e-2]}, "seeds": [0, 1, 2]}
    result = sweep_command(sweep, "--list")
    assert result.code == 0, result.err
    assert "6 runs, of which 0 were begun." in result.out
    assert made_up.ran == []
    assert not Path("out").exists()


def test_a_base_file_is_read_and_its_output_left_alone(made_up: MadeUp) -> None:
    write_config(Path("base.yaml"), {**BASE, "output": "elsewhere"})
    result = sweep_command({"config": None, "base": "base.yaml", "grid": {RATE: [1e-3]}})
    assert result.code == 0, result.err
    assert Path("out/runs/learning_rate=0.001").is_dir()
    assert not Path("elsewhere").exists()
    assert yaml.safe_load(Path("out/sweep.yaml").read_text())["config"]["model"] == "decoder"


def test_two_sweeps_cannot_write_one_folder(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: Any) -> Outcome:
        with pytest.raises(SweepFolderError, match="another process is at work"):
            run_sweep(sweep_of(grid={RATE: [1e-3]}))
        return made_up(*arguments)

    monkeypatch.setattr(sweep_module, "run_here", run)
    run_sweep(sweep_of(grid={RATE: [1e-3]}))
    assert len(made_up.ran) == 1


def test_more_than_a_thousand_runs_are_refused(made_up: MadeUp) -> None:
    sweep = sweep_of(grid={"training.warmup_ratio": [0.0, 0.1]}, seeds=list(range(501)))
    with pytest.raises(TooMany, match="has 1,002 runs"):
        run_sweep(sweep)
    assert made_up.ran == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gird": {}}, "unknown key 'gird'. Did you mean 'grid'?"),
        ({"training": {"epochs": 1}}, "Keys of the runs stand under config"),
        ({"grid": {"training.learning_rat": [1]}}, "Did you mean 'training.learning_rate'?"),
        ({"search": {"adapter.rr": {"choices": [4, 8]}}}, "unknown key 'adapter.rr'"),
        ({"search": {RATE: {"lo": 1e-5}}}, "Did you mean 'low'?"),
        ({"search": {RATE: {"low": 1e-5}}}, "needs low and high, or choices"),
        ({"search": {RATE: {"low": 1e-2, "high": 1e-5}}}, "is not below high"),
        ({"search": {RATE: {"low": 0, "high": 1, "log": True}}}, "is above 0"),
        ({"search": {"adapter.r": {"low": 4.5, "high": 8}}}, "takes whole numbers only"),
        ({"search": {RATE: {"low": 1, "choices": [1, 2]}}}, "has choices and a range"),
        ({"search": {RATE: {"low": -1, "high": 1}}}, "(training.learning_rate = -1)"),
        ({"grid": {RATE: [1e-3, "fast"]}}, "(training.learning_rate = fast)"),
        ({"grid": {RATE: 1e-3}}, "it should be a valid list"),
        ({"grid": {RATE: []}}, "is empty"),
        ({"grid": {RATE: [1e-3, 1e-3]}}, "has 0.001 twice"),
        ({"grid": {"adapter": [{"r": 4}]}}, "'adapter' is a section"),
        ({"grid": {"output": ["a"]}}, "output cannot be swept"),
        ({"grid": {"seed": [0, 1]}, "seeds": [0]}, "are averaged over"),
        ({"grid": {RATE: [1]}, "search": {RATE: {"low": 1, "high": 2}}}, "both name"),
        ({}, "nothing to sweep"),
        ({"seeds": [1], "config": None}, "found neither"),
        ({"seeds": [1], "base": "base.yaml"}, "found both"),
        ({"seeds": [1], "config": {**BASE, "data": {"train": "a", "validation_fraction": 0}}},
         "there are none"),
        ({"grid": {"training.dpo_beta": [0.01, 1.0]}, "config": PAIRS},
         "Set training.metric_for_best: rewards/accuracies"),
        ({"search": {"training.dpo_loss": {"choices": ["ipo", "hinge"]}}, "config": PAIRS},
         "cannot be swept where runs are compared by loss"),
        ({"search": {"training.completion_only_loss": {"choices": [True, False]}}},
         "changes which rows or tokens a run is scored on"),
        ({"search": {"data.max_length": {"low": 8, "high": 64}}}, "cannot be searched"),
        ({"search": {"data.validation_fraction": {"low": 0.1, "high": 0.2}}}, "cannot be searched"),
        ({"search": {"data.train": {"choices": ["a.jsonl", "b.jsonl"]}}}, "cannot be searched"),
        ({"search": {"model": {"choices": ["a", "b"]}}}, "Give its values under grid"),
        ({"search": {"adapter.r": {"choices": ["8", 8]}}}, "search.adapter.r has 8 twice"),
        ({"search": {"training.save_steps": {"low": 1, "high": 9}}}, "it changes no result"),
        ({"search": {"training.eval_batch_size": {"choices": [1, 2]}}}, "it changes no result"),
        ({"seeds": [1], "config": {**BASE, "devices": {"processes": 2}}}, "Leave isolate out"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept_is_refused_before_the_first_run(
    content: dict[str, Any], message: str, made_up: MadeUp
) -> None:
    result = sweep_command(content)
    assert result.code == 1
    assert message in result.error
    assert made_up.ran == []
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"grid": {"training.dpo_beta": [0.01, 1.0]}, "config": {
            **PAIRS, "training": {"metric_for_best": "rewards/accuracies"}}},
        {"search": {"data.max_length": {"low": 8, "high": 64}}, "config": LABELLED},
        {"search": {"model": {"choices": ["a", "b"]}}, "config": LABELLED},
        {"search": {RATE: {"low": 1e-4, "high": 1e-2}}, "grid": {"data.max_rows": [10, 20]}},
    ],
)  # fmt: skip
def test_what_changes_no_measure_is_swept(content: dict[str, Any]) -> None:
    assert sweep_of(**content).swept


def stands_in_for_python(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Have runs apart be a shell script, which is given what Python would be."""
    stand_in = Path("python")
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(running.sys, "executable", str(stand_in.absolute()))


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_what_cannot_be_resumed_is_started_anew(
    method: str, made_up: MadeUp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PEFT's AdaLoRA loses its averages: its unfinished run would be refused for ever."""
    stands_in_for_python(monkeypatch, 'echo "$@"')
    settings = make_settings({**BASE, "method": method, "output": str(tmp_path / "run")}, "test")
    log, said = Path("run.log"), []
    for checkpoint in ("none", "checkpoint-3"):
        (tmp_path / "run.unfinished/checkpoints" / checkpoint).mkdir(parents=True)
        assert run_apart(settings, log, SweepSignals()).status == "complete"
        said.append(log.read_text().splitlines()[-1])
    assert said[0].endswith("--resume auto")
    assert said[1].endswith("--force" if method == "adalora" else "--resume auto")


@pytest.mark.parametrize(("name", "is_memory"), [("KILL", True), ("SEGV", False)])
def test_only_a_process_that_was_killed_may_have_lacked_memory(
    name: str, is_memory: bool, made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands_in_for_python(monkeypatch, f"kill -{name} $$")
    settings = make_settings({**BASE, "output": "run"}, "test")
    outcome = run_apart(settings, Path("run.log"), SweepSignals())
    assert outcome.status == ("unfinished" if is_memory else "failed")
    assert outcome.error
    assert outcome.error.startswith(f"its process was ended by SIG{name}")
    assert ("memory" in outcome.error) is is_memory


@pytest.mark.parametrize(
    ("code", "status"), [(1, "failed"), (130, "unfinished"), (143, "unfinished")]
)
def test_whether_a_process_was_stopped_by_somebody_else_is_known(
    code: int, status: str, made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands_in_for_python(monkeypatch, f"exit {code}")
    settings = make_settings({**BASE, "output": "run"}, "test")
    outcome = run_apart(settings, Path("run.log"), SweepSignals())
    assert outcome.status == status


def test_a_process_that_a_killed_one_left_is_waited_for(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands_in_for_python(monkeypatch, "echo second")
    settings = make_settings({**BASE, "output": "run"}, "test")
    with Path("run.log").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # handed on to the process, as run_apart does
        left = subprocess.Popen(["sh", "-c", "sleep 0.3; echo first"], stdout=log)
    assert run_apart(settings, Path("run.log"), SweepSignals()).status == "complete"
    assert left.wait() == 0
    assert Path("run.log").read_text().split() == ["first", "second"]


def test_a_process_ends_with_the_wait_for_it(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a cluster takes the task back."""
    stands_in_for_python(monkeypatch, "echo $$ > pid; exec sleep 600")

    def taken_back() -> bool:
        if Path("pid").exists():
            raise KeyboardInterrupt
        return False

    settings = make_settings({**BASE, "output": "run"}, "test")
    with pytest.raises(KeyboardInterrupt):
        run_apart(settings, Path("run.log"), SweepSignals(), None, taken_back)
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)


def started(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "msplora", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(text: str, file: Path, process: subprocess.Popen[str]) -> None:
    """Until a run has printed that much; its sweep goes on meanwhile."""
    while not (file.is_file() and text in file.read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.thorough
def test_runs_in_processes_of_their_own_are_stopped_killed_and_continued(here: Path) -> None:
    training = {**BASE["training"], "max_steps": 120, "eval_steps": 10, "warmup_ratio": 0.0}
    content = {"output": "out", "config": {**BASE, "training": training}}
    content["grid"] = {RATE: [0.01, 1e30]}
    file = str(write_config(Path("sweep.yaml"), content))
    logs = here / "out/logs"
    process = started("sweep", file)
    wait_for("epoch 5", logs / "learning_rate=0.01.log", process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 143, out
    assert "To go on: msplora sweep" in out
    assert [row["status"] for row in rows_in()] == ["unfinished"]
    # Killed, the process that trains is left: until it has ended too the folder is not free.
    process = started("sweep", file)
    wait_for("goes on after step", logs / "learning_rate=0.01.log", process)
    process.kill()
    process.communicate()
    refused = started("sweep", file)
    assert "another process is at work" in refused.communicate(timeout=200)[0]
    folder = os.open("out", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # waits for it
    os.close(folder)
    assert Path("out/runs/learning_rate=0.01").is_dir()
    process = started("sweep", file)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    rows = rows_in()
    assert [row["status"] for row in rows] == ["complete", "diverged"]
    assert "Lower training.learning_rate" in rows[1]["error"]
    assert 50e6 < rows[0]["resident_bytes"] < 50e9
    assert not list(Path("out/runs").glob("*.unfinished"))
    assert not list(logs.glob("*.yaml"))
    # It is the run that nobody stopped.
    alone = {**content["config"], "output": "alone"}
    write_config(Path("one.yaml"), alone)
    assert msplora("train", "one.yaml", "--set", f"{RATE}=0.01").code == 0
    adapters = [Path(its, "adapter") for its in ("alone", "out/runs/learning_rate=0.01")]
    assert same(*map(tensors, adapters))


@pytest.mark.thorough
def test_a_run_that_fails_or_is_killed_takes_no_other_with_it(here: Path) -> None:
    training = {**BASE["training"], "max_steps": 100}
    content: dict[str, Any] = {"output": "out", "config": {**BASE, "training": training}}
    content["grid"] = {"adapter.r": [2, 4, 8]}  # three levels need at least 4
    process = started("sweep", str(write_config(Path("sweep.yaml"), content)))
    wait_for("training", here / "out/logs/r=4.log", process)
    [child] = [
        int(path.name)
        for path in Path("/proc").iterdir()
        if path.name.isdigit() and b"r=4.yaml" in _command_of(path)
    ]
    os.kill(child, signal.SIGKILL)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 1, out
    assert "2 of 3 failed" in out
    rows = rows_in()
    assert [row["status"] for row in rows] == ["failed", "failed", "complete"]
    assert "r must be at least 4" in rows[0]["error"]
    assert "SIGKILL" in rows[1]["error"]


def _command_of(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
