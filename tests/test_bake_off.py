"""A bake-off runs what is missing and only that, each method at its best rate, and reports it.

Where only the bookkeeping counts, a run is replaced by one whose accuracy is a known function of
its method, rate, task and seed.
"""

from __future__ import annotations

import errno
import json
import math
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import transformers as hf
from rich.console import Console

from msplora.bakeoff import engines, running
from msplora.bakeoff.bake_off import Outcome, _Running, outcome_so_far, run_bake_off
from msplora.bakeoff.reading import BakeOff, Run, make_bake_off
from msplora.bakeoff.rejecting import Rejecting
from msplora.bakeoff.report import NOT_OVER, draw, markdown, page, write_report
from msplora.bakeoff.running import Job
from msplora.bakeoff.settings import RejectSettings
from msplora.bakeoff.sizes import Prepared, prepare
from msplora.bakeoff.statistics import standings
from msplora.errors import ConfigError, MSPLoraError
from msplora.sweep.folder import SweepFolderError
from msplora.sweep.rows import Row, Rows
from msplora.sweep.running import Outcome as RunOutcome
from msplora.sweep.running import SweepSignals
from msplora.train.run import prepare_job
from msplora.train.stopping import Interrupted
from runs import labelled_rows, msplora, save_encoder, write_config, write_jsonl

BEST = {"lora": 1e-3, "pyramid": 1e-2, "small": 1e-3}
"""The rate at which each made-up method does best."""
SPEC: dict[str, Any] = {
    "output": "out",
    "base": {
        "model": "encoder",
        "task": "classification",
        "data": {"validation_fraction": 0.25},
        "adapter": {"target_modules": ["query", "value"]},
        "training": {"epochs": 3, "batch_size": 8, "check_saved": False},
    },
    "tasks": {"one": {"data": {"train": "one.jsonl"}}, "two": {"data": {"train": "two.jsonl"}}},
    "methods": {
        "lora": {"method": "lora"},
        "pyramid": {"method": "msplora", "adapter": {"r": 8}},
        "small": {"method": "lora", "adapter": {"r": 4}},
    },
    "learning_rates": [1e-3, 1e-2, 1e-4],
    "choose": {"tasks": ["one"]},
    "seeds": [0, 1],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    save_encoder(folder / "encoder")
    write_jsonl(folder / "one.jsonl", labelled_rows(40))
    write_jsonl(folder / "two.jsonl", labelled_rows(44))
    return folder


@pytest.fixture
def here(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("encoder", "one.jsonl", "two.jsonl"):
        (tmp_path / name).symlink_to(bases / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spec(**changes: Any) -> BakeOff:
    return make_bake_off({**SPEC, **changes}, "spec.yaml")


def prepared(**changes: Any) -> Prepared:
    """Without looking at model and data."""
    bake_off = spec(**changes)
    sizes = {name: 1000 * (2 + place) for place, name in enumerate(bake_off.entrants)}
    return Prepared(bake_off, sizes, dict.fromkeys(bake_off.settings.tasks, "accuracy"))


def accuracy(method: str, rate: float, task: str, seed: int) -> float:
    far = abs(math.log10(rate / BEST.get(method, 1e-3)))
    return round(0.9 - 0.1 * far - 0.2 * (task == "two") - 0.01 * seed, 6)


class MadeUp:
    """Stands for `make_run`: three evaluations, each a little better than the one before."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails: set[str] = set()
        self.diverges: set[str] = set()
        self.stop_after: int | None = None

    def __call__(self, job: Job, stop: Any, *_: Any) -> Row:
        row, its = job.row, job.row.parameters
        if len(self.ran) == self.stop_after:
            self.stop_after = None
            raise KeyboardInterrupt
        self.ran.append(row.name)
        row.seconds += 2.0
        if row.name in self.diverges:
            row.status, row.error = "diverged", "the loss is nan"
            return row
        if row.name in self.fails:
            row.status, row.error = "failed", "out of memory"
            return row
        value = accuracy(its["method"], its["learning_rate"], its["task"], its["seed"])
        found = [
            {"epoch": float(step), "step": step, "accuracy": value - 0.1 * (3 - step)}
            for step in (1, 2, 3)
        ]
        for count in (1, 2, 3):
            if job.rejecting and job.rejecting.until_hopeless(found[:count], 3):
                row.status, row.evaluations, row.steps = "rejected", found[:count], 3
                return row
        row.status, row.metric, row.value = "complete", "accuracy", value
        row.evaluations, row.best, row.train_seconds = found, found[-1], 1.0
        row.resident_bytes, row.commit, row.hardware = 2**20, "abc", "a machine"
        row.versions = {"msplora": "1"}
        return row


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MadeUp:
    monkeypatch.chdir(tmp_path)
    run = MadeUp()
    monkeypatch.setattr(engines, "make_run", run)
    return run


def rows_in(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(output, "results.jsonl").read_text().splitlines()]


def rates_of(outcome: Outcome) -> dict[str, float | None]:
    return {name: its.best.rate if its.best else None for name, its in outcome.choices.items()}


def names(runs: list[str], *parts: str) -> list[str]:
    return [name for name in runs if all(part in name.split(",") for part in parts)]


def test_each_method_runs_at_its_own_best_rate_on_all_tasks_and_seeds(made_up: MadeUp) -> None:
    outcome = run_bake_off(prepared())
    assert rates_of(outcome) == BEST
    counted = [(run.entrant, run.task, run.learning_rate, run.seed) for run in outcome.finals]
    assert counted == [
        (name, task, BEST[name], seed)
        for task in ("one", "two")
        for name in BEST
        for seed in (0, 1)
    ]
    for run, row in outcome.finals.items():
        assert row is not None
        wanted = accuracy(run.entrant, run.learning_rate, run.task, run.seed)
        assert (row.status, row.value) == ("complete", wanted)
    # Rates are chosen with the first seed on the first task only.
    others = [name for name in made_up.ran if "seed=1" in name or name.startswith("two,")]
    assert len(others) == 3 * 3
    assert len(set(made_up.ran)) == len(made_up.ran)  # nothing is run twice


def test_the_best_rate_at_an_end_is_followed_outwards(made_up: MadeUp) -> None:
    outcome = run_bake_off(prepared(choose={"tasks": ["one"], "extend": 2}))
    tried = {name: [its.rate for its in choice.tried] for name, choice in outcome.choices.items()}
    # The pyramid's best, 1e-2, is the highest that was given: one beyond it is worse, and enough.
    assert tried == {
        "lora": [1e-4, 1e-3, 1e-2],
        "pyramid": [1e-4, 1e-3, 1e-2, 1e-1],
        "small": [1e-4, 1e-3, 1e-2],
    }
    kept = run_bake_off(prepared(output="kept", choose={"tasks": ["one"], "extend": 0}))
    assert [its.rate for its in kept.choices["pyramid"].tried] == [1e-4, 1e-3, 1e-2]


def test_rates_that_are_no_longer_in_the_file_do_not_count(made_up: MadeUp) -> None:
    run_bake_off(prepared(choose={"tasks": ["one"], "extend": 0}))  # 1e-4, 1e-3, 1e-2
    finer: dict[str, Any] = {"learning_rates": [2e-4, 4e-4], "choose": {"tasks": ["one"]}}
    assert not outcome_so_far(prepared(**finer)).is_over  # as many were tried, and others
    outcome = run_bake_off(prepared(**finer))
    assert outcome.is_over
    tried = {name: [its.rate for its in choice.tried] for name, choice in outcome.choices.items()}
    assert tried == {name: [2e-4, 4e-4, 8e-4] for name in BEST}
    assert rates_of(outcome) == dict.fromkeys(BEST, 8e-4)
    # One that was run for an earlier file counts where it is reached, and is not run again.
    made_up.ran.clear()
    coarser = run_bake_off(prepared(learning_rates=[1e-4, 1e-3], choose={"tasks": ["one"]}))
    assert [its.rate for its in coarser.choices["pyramid"].tried] == [1e-4, 1e-3, 1e-2]
    assert names(made_up.ran, "one", "pyramid", "seed=0") == []


def test_a_report_of_nothing_is_refused(made_up: MadeUp) -> None:
    with pytest.raises(SweepFolderError, match=r"no run of the bake-off in .*out was begun"):
        write_report(outcome_so_far(prepared()))
    assert not Path("out").exists()
    assert run_bake_off(prepared()).is_over


def test_one_rate_is_not_said_to_be_followed_outwards(made_up: MadeUp) -> None:
    several, one = (
        markdown(outcome_so_far(prepared(learning_rates=rates)), {})
        for rates in ([1e-3, 1e-2], [1e-3])
    )
    assert "the next one beyond it is tried too" in several
    assert "the next one beyond it" not in one


def test_a_rate_far_behind_is_given_up_and_changes_no_choice(made_up: MadeUp) -> None:
    everything = run_bake_off(prepared(output="all"))
    quick = run_bake_off(prepared(reject={"after": 0.5, "behind": 0.05}))
    assert rates_of(quick) == rates_of(everything)
    given_up = {row.name: row for row in quick.rows if row.status == "rejected"}
    # Of the rates that are ten times off, all but the first that was tried.
    assert set(given_up) == {
        "one,lora,learning_rate=0.01,seed=0",
        "one,lora,learning_rate=0.0001,seed=0",
        "one,pyramid,learning_rate=0.0001,seed=0",
        "one,pyramid,learning_rate=0.1,seed=0",
        "one,small,learning_rate=0.01,seed=0",
        "one,small,learning_rate=0.0001,seed=0",
    }
    assert {len(row.evaluations) for row in given_up.values()} == {2}  # half of three
    assert all(row and row.status == "complete" for row in quick.finals.values())


def test_a_run_that_ended_before_one_looked_is_rejected_all_the_same(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("lora", "one", 1e-3, 0)
    settings = spec().settings_of(run)
    found = [{"epoch": its, "step": its, "accuracy": its / 10} for its in (1, 2, 3)]
    metrics = {
        "metric_for_best": "accuracy", "best": found[-1], "before": None, "trainable": 1,
        "evaluations": found, "max_steps": 3,
    }  # fmt: skip
    monkeypatch.setattr(running, "run_apart", lambda *_: RunOutcome("complete", 1.0))
    made = []
    for rival in (0.2, 0.5):
        contents = {"metrics": metrics, "log_history": [], "versions": {}}
        Path(settings.output).mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            Path(settings.output, f"{name}.json").write_text(json.dumps(content))
        rule = RejectSettings(after=0.5, behind=0.1)
        rejecting = Rejecting(rule, "accuracy", [[{"step": 1, "accuracy": rival}]])
        row = Row(run.name, run.parameters, 0, "unfinished", {})
        made.append(running.make_run(Job(row, settings, here / "log", rejecting), SweepSignals()))
        assert Path(settings.output).exists() is (rival == 0.2)
    lived, rejected = made
    assert (lived.status, lived.value, lived.evaluations) == ("complete", 0.3, found)
    assert (rejected.status, rejected.value, rejected.evaluations) == ("rejected", None, found[:2])
    assert rejected.steps == 3


def test_a_method_of_which_no_rate_came_to_its_end_runs_those_given_up(made_up: MadeUp) -> None:
    both: dict[str, Any] = {"learning_rates": [1e-3, 1e-4], "choose": {"tasks": ["one", "two"]}}
    one, two = (f"{task},lora,learning_rate={{:g}},seed=0" for task in ("one", "two"))
    made_up.diverges = {one.format(1e-3)}  # it is no rival on task one, and is one on task two
    found = prepared(
        methods={"lora": {"method": "lora"}}, reject={"after": 0.5, "behind": 0.05}, **both
    )
    outcome = run_bake_off(found)
    assert made_up.ran.count(two.format(1e-4)) == 2  # given up, then run to its end
    assert rates_of(outcome) == {"lora": 1e-4}
    assert all(row and row.status == "complete" for row in outcome.finals.values())


def test_a_rule_that_was_changed_is_applied_anew(made_up: MadeUp) -> None:
    run_bake_off(prepared(reject={"after": 0.5, "behind": 0.05}))
    given_up = {row["name"] for row in rows_in("out") if row["status"] == "rejected"}
    made_up.ran.clear()
    run_bake_off(prepared(reject={"after": 0.5, "behind": 0.04}))
    assert made_up.ran == []
    run_bake_off(prepared(reject={"after": 0.5, "behind": 1.0}))
    tried_beyond = "one,pyramid,learning_rate=0.1,seed=0"
    assert set(made_up.ran) == given_up - {tried_beyond}


def test_a_row_that_another_process_wrote_meanwhile_is_kept(made_up: MadeUp) -> None:
    """The other one ended between the look at the folder and the hold of it."""
    late = _Running(prepared(), Console(), None, False)
    run_bake_off(prepared())
    made_up.ran.clear()
    before = rows_in("out")
    late.run()
    assert made_up.ran == []
    assert rows_in("out") == before


def test_what_was_stopped_goes_on_and_repeats_nothing(made_up: MadeUp) -> None:
    made_up.stop_after = 7
    with pytest.raises(Interrupted, match="give the same command again"):
        run_bake_off(prepared())
    so_far = outcome_so_far(prepared())
    assert sum(row.status == "complete" for row in so_far.rows) == 7
    assert NOT_OVER in markdown(so_far, {})
    assert NOT_OVER in page(so_far, {})
    finished = run_bake_off(prepared())
    assert all(row and row.status == "complete" for row in finished.finals.values())
    assert len(set(made_up.ran)) == len(made_up.ran)
    before = list(made_up.ran)
    run_bake_off(prepared())
    assert made_up.ran == before


def test_a_crash_is_recorded_and_the_rest_goes_on(made_up: MadeUp) -> None:
    lost = "two,small,learning_rate=0.001,seed=1"
    made_up.fails = {lost}
    outcome = run_bake_off(prepared())
    rows = {row.name: row for row in outcome.rows}
    assert (rows[lost].status, rows[lost].error) == ("failed", "out of memory")
    complete = [its for its in outcome.finals.values() if its and its.status == "complete"]
    assert len(complete) == 11
    small = next(its for its in standings(outcome) if its.name == "small")
    assert small.missing == {"failed": 1}
    assert small.overall is not None
    assert len(small.overall.values) == 1  # of the seed that has all tasks
    text = markdown(outcome, {})
    assert "out of memory" in text
    assert f"{small.overall.mean:.4f} (1 of 2 seeds)" in text
    made_up.fails = set()
    made_up.ran.clear()
    run_bake_off(prepared())
    assert made_up.ran == []
    run_bake_off(prepared(), retry_failed=True)
    assert made_up.ran == [lost]


def test_a_full_disk_loses_nothing(made_up: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Rows.put

    def full(rows: Rows, row: Row) -> None:
        if len(made_up.ran) == 3 and row.status == "complete":
            raise OSError(errno.ENOSPC, "No space left on device")
        put(rows, row)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "put", full)
        with pytest.raises(SweepFolderError, match=r"No space left.*give the same command again"):
            run_bake_off(prepared())
    assert [row["status"] for row in rows_in("out")] == ["complete", "complete", "unfinished"]
    outcome = run_bake_off(prepared())
    assert all(row and row.status == "complete" for row in outcome.finals.values())


def test_a_rate_that_fails_is_not_chosen(made_up: MadeUp) -> None:
    made_up.fails = {"one,lora,learning_rate=0.001,seed=0"}
    outcome = run_bake_off(prepared())
    assert rates_of(outcome)["lora"] == 1e-4  # of two alike the lower


def test_methods_tasks_rates_and_seeds_may_be_added(made_up: MadeUp) -> None:
    run_bake_off(prepared())
    made_up.ran.clear()
    more = {**SPEC["methods"], "dora": {"method": "dora"}}
    outcome = run_bake_off(prepared(methods=more, seeds=[0, 1, 2]))
    assert len(names(made_up.ran, "dora")) == len(made_up.ran) - 3 * 2  # a seed of the old three
    assert len(outcome.finals) == 4 * 2 * 3


def test_another_bake_off_is_refused(made_up: MadeUp, tmp_path: Path) -> None:
    run_bake_off(prepared())
    rows = Path("out/results.jsonl").read_text()
    longer = {**SPEC["base"], "training": {**SPEC["base"]["training"], "epochs": 5}}
    with pytest.raises(SweepFolderError, match=r"another lora on one: training.epochs was unset"):
        run_bake_off(prepared(base=longer))
    other = {**SPEC["methods"], "small": {"method": "lora", "adapter": {"r": 2}}}
    with pytest.raises(SweepFolderError, match=r"another small on one: adapter.r was 4 and is 2"):
        run_bake_off(prepared(methods=other))
    Path("swept").mkdir()
    row = Row("r=8", {"adapter.r": 8}, 0, "complete", {})
    Path("swept/results.jsonl").write_text(json.dumps(asdict(row)) + "\n")
    with pytest.raises(SweepFolderError, match="holds a sweep's runs, such as r=8"):
        run_bake_off(prepared(output="swept"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(SweepFolderError, match="holds no bake-off"):
        run_bake_off(prepared(output="mine"))
    assert Path("out/results.jsonl").read_text() == rows


def test_results_of_other_data_are_not_compared(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "one.jsonl", labelled_rows(40))
    run_bake_off(prepared())
    assert all(row["files"] for row in rows_in(SPEC["output"]) if row["name"].startswith("one,"))
    count = len(made_up.ran)
    # Elsewhere the same files are the same, and those that are not there are not compared.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / SPEC["output"]).rename(tmp_path / "elsewhere" / SPEC["output"])
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_bake_off(prepared())
    rows = rows.rename(tmp_path / "elsewhere/one.jsonl")
    run_bake_off(prepared())
    write_jsonl(rows, labelled_rows(41))
    for _ in range(2):  # and the folder is free again
        with pytest.raises(SweepFolderError, match=r"one\.jsonl of data\.train had other content"):
            run_bake_off(prepared())
    assert len(made_up.ran) == count


def test_the_same_on_another_machine_is_the_same(made_up: MadeUp) -> None:
    """The rows name no folder: they are found again where model and data lie elsewhere."""
    run_bake_off(prepared())
    text = Path("out/results.jsonl").read_text()
    made_up.ran.clear()
    moved = {**SPEC["base"], "model": "/elsewhere/models/encoder"}
    plain = {**SPEC["base"], "model": "models/encoder"}
    assert "/elsewhere" not in text
    run_bake_off(prepared(output="there", base=plain))
    made_up.ran.clear()
    run_bake_off(prepared(output="there", base=moved))
    assert made_up.ran == []


def _reading(folder: str) -> dict[str, Any]:
    """A bake-off whose model and rows lie in a folder."""
    base = {**SPEC["base"], "model": f"{folder}/hf"}
    tasks = {"one": {"data": {"train": f"{folder}/data/train.jsonl"}}}
    return {"base": base, "tasks": tasks, "methods": {"lora": SPEC["methods"]["lora"]}}


def _put(folder: str, weights: bytes, rows: int) -> None:
    for name in ("hf", "data"):
        Path(folder, name).mkdir(parents=True, exist_ok=True)
    Path(folder, "hf/model.safetensors").write_bytes(weights)
    write_jsonl(Path(folder, "data/train.jsonl"), labelled_rows(rows))


def test_other_data_or_weights_under_the_same_name_are_refused(made_up: MadeUp) -> None:
    weights = bytes(range(256)) * 1000
    _put("v1", weights, 12)
    _put("v2", weights, 14)
    _put("v3", bytes(reversed(weights)), 12)
    run_bake_off(prepared(**_reading("v1")))
    rows = rows_in("out")
    assert all(set(row["files"]) == {"model", "data.train"} for row in rows)
    made_up.ran.clear()
    for folder, what in (
        ("v2", r"train\.jsonl of data\.train"),
        ("v3", r"model\.safetensors of model"),
    ):
        with pytest.raises(SweepFolderError, match=f"task one .* is not what it was: {what} had"):
            run_bake_off(prepared(**_reading(folder)))
    _put("v1", weights, 13)  # what was there is edited
    with pytest.raises(SweepFolderError, match=r"data\.train had other content when one,lora,"):
        outcome_so_far(prepared(**_reading("v1")))
    assert (made_up.ran, rows_in("out")) == ([], rows)


def test_the_same_content_under_any_path_is_the_same(made_up: MadeUp) -> None:
    _put("v1", b"weights", 12)
    run_bake_off(prepared(**_reading("v1")))
    made_up.ran.clear()
    there = _reading("v1/data/../../v1")
    Path("v1/data/train.jsonl").rename("renamed.jsonl")
    there["tasks"] = {"one": {"data": {"train": "renamed.jsonl"}}}
    run_bake_off(prepared(**there))
    assert made_up.ran == []


def test_data_that_is_edited_under_way_stops_it_there(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put("v1", b"weights", 12)

    def edits(job: Job, stop: Any, *_: Any) -> Row:
        row = made_up(job, stop)
        _put("v1", b"weights", 13)
        return row

    monkeypatch.setattr(engines, "make_run", edits)
    with pytest.raises(SweepFolderError, match=r"had other content when this was started"):
        run_bake_off(prepared(**_reading("v1")))
    assert [row["status"] for row in rows_in("out")] == ["complete"]


def test_rows_that_know_no_checksums_are_found_by_the_names_of_their_files(
    made_up: MadeUp,
) -> None:
    _put("v1", b"weights", 12)
    run_bake_off(prepared(**_reading("v1")))
    rows = rows_in("out")
    for row in rows:
        row["config"]["data.train"] = "train.jsonl"
        del row["files"]
    Path("out/results.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    made_up.ran.clear()
    outcome = run_bake_off(prepared(**_reading("v1")))
    assert made_up.ran == []
    assert f"what {len(rows)} of the runs read was not recorded" in markdown(outcome, {})
    Path("v1/data/train.jsonl").rename("v1/data/test.jsonl")
    other = _reading("v1")
    other["tasks"] = {"one": {"data": {"train": "v1/data/test.jsonl"}}}
    with pytest.raises(SweepFolderError, match=r"data.train was train.jsonl and is data/test"):
        run_bake_off(prepared(**other))


def test_a_lost_row_is_read_from_its_run(here: Path, made_up: MadeUp) -> None:
    run_bake_off(prepared())
    name = "one,lora,learning_rate=0.001,seed=0"
    settings = write_config(here / "run.yaml", _content_of(spec(), name))
    assert msplora("train", settings).code == 0
    kept = [json.dumps(row) for row in rows_in("out") if row["name"] != name]
    Path("out/results.jsonl").write_text("\n".join(kept) + "\n")
    made_up.ran.clear()
    outcome = run_bake_off(prepared())
    assert name not in made_up.ran
    found = next(row for row in outcome.rows if row.name == name)
    metrics = json.loads(Path("out/runs", name, "metrics.json").read_text())
    assert found.value == metrics["best"]["accuracy"]
    assert [its["step"] for its in found.evaluations] == [4, 8, 12]
    assert found.train_seconds is not None


def _content_of(bake_off: BakeOff, name: str) -> dict[str, Any]:
    task, method, rate, seed = name.split(",")
    run = Run(method, task, float(rate.partition("=")[2]), int(seed.partition("=")[2]))
    return bake_off.settings_of(run).to_dict()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"methods": {"a": {"method": "loar"}}}, r"method = 'loar'.*Did you mean 'lora'"),
        ({"choose": {"tasks": ["on"]}}, r"choose.tasks names 'on'.*Did you mean 'one'"),
        ({"baseline": "laro"}, r"baseline names 'laro'.*Did you mean 'lora'"),
        ({"method": {}}, r"unknown key 'method'. Keys of the runs stand under base"),
        ({"reject": {"behnd": 1}}, r"unknown key 'reject.behnd'. Did you mean 'behind'"),
        ({"learning_rates": [0.0]}, r"learning_rates.0 = 0.0: it should be greater than 0"),
        ({"tasks": {"a b": {}}}, r"tasks.a b: a name becomes part of a folder's"),
        ({"base": {**SPEC["base"], "seed": 1}}, r"base has 'seed': it is among the `seeds`"),
        ({"seeds": [1, 1]}, r"seeds = \[1, 1\] has 1 twice"),
        (
            {"methods": {"a": {"method": "lora", "budget": "pyramyd"}, "pyramid": {}}},
            r"methods.a: budget = 'pyramyd' names no other method. Did you mean 'pyramid'",
        ),
        ({"methods": {"a": {"method": "lora", "budget": -1}}}, r"it should be a number of param"),
        (
            {"methods": {"a": {"method": "lora", "learning_rates": [1, 1]}}},
            r"methods.a: learning_rates = \[1, 1\]: it should be a list of numbers above 0",
        ),
        ({"learning_rates": [1e-3, 1.0000001e-3]}, r"that differ in their first six digits"),
        ({"learning_rates": [math.inf]}, r"learning_rates.0 = inf: it should be a finite number"),
        ({"seeds": [0, -1]}, r"seeds.1 = -1: it should be greater than or equal to 0"),
        ({"choose": {"tasks": ["one", "one"]}}, r"choose.tasks = .* has 'one' twice"),
        ({"methods": {"a": {"method": "lora", "budget": []}}}, r"a list should hold at least one"),
        (
            {"methods": {"a": {"method": "lora", "budget": [9, 9]}}},
            r"budget = \[9, 9\]: .* and none twice",
        ),
        (
            {"methods": {"a": {"method": "lora", "training": {"learning_rate": 1e-3}}}},
            r"methods.a has 'training.learning_rate': each method chooses it",
        ),
        (
            {"base": {**SPEC["base"], "data": {"validation_fraction": 0}}},
            r"compared on held-out rows, and task one has none|it needs held-out rows",
        ),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        spec(**changes)


def _sizes(**methods: Any) -> Prepared:
    return prepare(spec(methods={"lora": {"method": "lora"}, **methods}))


def test_a_budget_is_met_by_the_smallest_rank_that_is_not_below_it(here: Path) -> None:
    found = _sizes(
        pyramid={"method": "msplora", "adapter": {"r": 8}},
        small={"method": "lora", "budget": "pyramid"},
        fixed={"method": "lora", "budget": [1300, 2048]},
        blocks={"method": "gralora", "gralora": {"gralora_k": 2}, "budget": 1000},
    )
    a_rank = 4 * 2 * (16 + 16)  # layers, sites, in + out
    assert found.sizes == {
        "lora": 8 * a_rank,
        "pyramid": 8 * 64 + 3 * 4 * 64 + 4 * 2 * 64,
        "small": 7 * a_rank,
        "fixed@1300": 6 * a_rank,
        "fixed@2048": 8 * a_rank,
        "blocks": 4 * a_rank,
    }
    assert found.metrics == {"one": "accuracy", "two": "accuracy"}
    ranks = {
        name: its.content["adapter"]["r"] for name, its in list(found.bake_off.entrants.items())[2:]
    }
    assert ranks == {"small": 7, "fixed@1300": 6, "fixed@2048": 8, "blocks": 4}
    assert found.ranks == {name: f"adapter.r = {rank}" for name, rank in ranks.items()}


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ({"method": "lora", "budget": 40}, r"no rank comes near it: adapter.r = 1 trains 256"),
        ({"method": "hydra", "budget": 900}, r"set hydra.r_parallel and hydra.r_sequential"),
        (
            {"method": "lora", "budget": 10**9},
            r"no adapter.r up to 4,096 trains as much; adapter.r = 4,096 trains 1,048,576",
        ),
    ],
)
def test_a_budget_that_no_rank_reaches_is_refused(
    here: Path, method: dict[str, Any], error: str
) -> None:
    with pytest.raises(ConfigError, match=error):
        _sizes(other=method)


def test_data_is_read_once_per_task_and_a_size_is_without_the_head_of_the_task(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def reads(settings: Any, load: Any) -> Any:
        read.append(Path(settings.data.train).name)
        return prepare_job(settings, load)

    monkeypatch.setattr("msplora.bakeoff.sizes.prepare_job", reads)
    rows = [{**row, "label": place % 3} for place, row in enumerate(labelled_rows(44))]
    write_jsonl(here / "three.jsonl", rows)
    tasks = {**SPEC["tasks"], "three": {"data": {"train": "three.jsonl"}}}
    methods = {name: {"method": name} for name in ("lora", "full", "frozen")}
    found = prepare(spec(methods=methods, tasks=tasks))
    assert read == ["one.jsonl", "two.jsonl", "three.jsonl"]
    encoder = hf.BertModel.from_pretrained(here / "encoder", add_pooling_layer=False)
    assert found.sizes["full"] == encoder.num_parameters()


@pytest.mark.parametrize(
    ("modules", "error"),
    [
        (["query"], r"lora trains 2,048 numbers on one and 1,024 on two, and sizes are compared"),
        (["qeury"], r"spec.yaml \(lora on two\): .*qeury"),
    ],
)
def test_a_method_that_is_not_the_same_on_another_task_is_refused(
    here: Path, modules: list[str], error: str
) -> None:
    two = {**SPEC["tasks"]["two"], "adapter": {"target_modules": modules}}
    with pytest.raises(ConfigError, match=error):
        prepare(spec(methods={"lora": {"method": "lora"}}, tasks={**SPEC["tasks"], "two": two}))


def test_methods_of_one_task_are_judged_by_one_metric(here: Path) -> None:
    by_loss = {"method": "lora", "training": {"metric_for_best": "loss"}}
    with pytest.raises(ConfigError, match=r"methods.other has 'training.metric_for_best'"):
        spec(methods={"lora": {"method": "lora"}, "other": by_loss})
    rows = [{**row, "label": place % 3} for place, row in enumerate(labelled_rows(24))]
    write_jsonl(here / "numbers.jsonl", rows)
    methods: dict[str, Any] = {"lora": {"method": "lora"}}
    methods["other"] = {"method": "lora", "data": {"regression": True}}
    error = r"\(other on one\): it would be judged by \w+, and the methods before it .* accuracy"
    with pytest.raises(ConfigError, match=error):
        prepare(spec(methods=methods, tasks={"one": {"data": {"train": "numbers.jsonl"}}}))


def test_what_no_run_could_do_is_refused_before_the_first(here: Path) -> None:
    (here / "two.jsonl").unlink()
    with pytest.raises(MSPLoraError, match=r"two\.jsonl"):
        prepare(spec())


def test_the_report_says_what_the_rows_say(made_up: MadeUp) -> None:
    outcome = run_bake_off(prepared(reject={"after": 0.5, "behind": 0.05}))
    write_report(outcome)
    text = Path("out/report.md").read_text()
    html = Path("out/report.html").read_text()
    for name in BEST:
        values = [
            mean(accuracy(name, BEST[name], task, seed) for task in ("one", "two"))
            for seed in (0, 1)
        ]
        assert f"{mean(values):.4f} ± 0.0071" in text
        assert f"{mean(values):.4f} ± 0.0071" in html
    assert "a run is given up, after 50% of it" in text
    assert "commit: abc (" in text
    assert "Tried: 3 by lora, 4 by pyramid, 3 by small" in text
    assert "With 4 pairs none can be below 0.12, which Holm's correction makes 0.25" in text
    assert NOT_OVER not in text + html
    for name in ("front", "differences", "rates"):
        assert Path(f"out/{name}.svg").read_text().startswith("<?xml")
        assert f"({name}.svg)" in text
    assert html.count("data:image/svg+xml;base64,") == 3
    for outside in ("http://", "https://", "<script", "<link"):
        assert outside not in html


def test_names_from_files_are_escaped(made_up: MadeUp) -> None:
    found = prepared()
    made_up.fails = {"one,lora,learning_rate=0.001,seed=0"}
    outcome = run_bake_off(found)
    row = next(its for its in outcome.rows if its.status == "failed")
    row.error = "<b>not | bold</b>"
    html, text = page(outcome, draw(outcome)), markdown(outcome, {})
    assert "<b>not" not in html
    assert "&lt;b&gt;not | bold" in html
    assert r"&lt;b>not \| bold&lt;/b>" in text


@pytest.mark.thorough
def test_its_runs_are_those_that_train_makes(here: Path) -> None:
    content = {
        **SPEC,
        "methods": {"lora": {"method": "lora"}},
        "learning_rates": [1e-5, 1e-1],
        "choose": {"tasks": ["one"], "extend": 0},
        "reject": {"after": 0.3, "behind": 0.01},
        "seeds": [0],
    }
    content["tasks"] = {"one": {**SPEC["tasks"]["one"], "training": {"metric_for_best": "loss"}}}
    done = msplora("bake-off", write_config(here / "spec.yaml", content))
    assert done.code == 0, done.err
    rows = {row["name"]: row for row in rows_in("out")}
    best, high = (rows[f"one,lora,learning_rate={rate:g},seed=0"] for rate in (1e-5, 1e-1))
    # Far too high, the loss rises at first, and the run is stopped for real.
    assert (best["status"], high["status"]) == ("complete", "rejected")
    assert len(high["evaluations"]) < 3
    assert not list(Path("out/runs").glob("*learning_rate=0.1*"))
    alone = {**_content_of(make_bake_off(content, "spec.yaml"), best["name"]), "output": "alone"}
    assert msplora("train", write_config(here / "alone.yaml", alone)).code == 0
    metrics = json.loads(Path("alone/metrics.json").read_text())
    found = best["value"], best["evaluations"]
    assert found == (metrics["best"]["loss"], metrics["evaluations"])
    assert best["resident_bytes"] > 2**20
    assert f"{best['value']:.4f}" in done.out


def test_what_only_ray_takes_is_refused_without_it(here: Path) -> None:
    done = msplora("bake-off", write_config(here / "spec.yaml", SPEC), "--gpus", "1")
    assert done.code == 2
    assert "--cpus, --gpus: for --ray only" in done.err


@pytest.mark.thorough
def test_ray_makes_the_same_rows(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not part of the development environment")
    content = {**SPEC, "learning_rates": [1e-2], "choose": {"tasks": ["one"], "extend": 0}}
    content["methods"] = {"lora": {"method": "lora"}, "pyramid": {"method": "msplora"}}
    file = write_config(here / "spec.yaml", content)
    values: list[dict[str, float]] = []
    for output, flags in (("here", []), ("there", ["--ray", "local", "--cpus", "1"])):
        done = msplora("bake-off", file, "--output", output, *flags)
        assert done.code == 0, done.err
        values.append({row["name"]: row["value"] for row in rows_in(output)})
    assert values[0] == values[1]
    assert len(values[0]) == 8
