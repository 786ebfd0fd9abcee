"""A bake-off goes on with its own rows, wherever they lie, and with no others."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bake_offs import SPEC, MadeUp, prepared, rows_in
from msplora.bakeoff import engines
from msplora.bakeoff.bake_off import outcome_so_far, run_bake_off
from msplora.bakeoff.report import markdown
from msplora.bakeoff.running import Job
from msplora.sweep.folder import SweepFolderError
from msplora.sweep.rows import Row
from msplora.train.stopping import Interrupted
from runs import labelled_rows, write_jsonl


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


def test_data_that_changed_under_an_unfinished_run_are_refused(
    made_up: MadeUp, tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "one.jsonl", labelled_rows(40))
    made_up.stop_after = 0
    with pytest.raises(Interrupted):
        run_bake_off(prepared())
    write_jsonl(rows, labelled_rows(41))
    (row,) = rows_in(SPEC["output"])
    outcome_so_far(prepared())  # nothing was made of the old ones
    left = tmp_path / SPEC["output"] / "runs" / f"{row['name']}.unfinished"
    (left / "checkpoints/checkpoint-1").mkdir(parents=True)
    with pytest.raises(SweepFolderError, match=r"one\.jsonl of data\.train had other content"):
        run_bake_off(prepared())
    assert made_up.ran == []


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
