"""What `msplora eval` calls held out by a run are the rows that the run held out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from msplora.train import evaluation
from msplora.train.classification_rows import labelled_data
from msplora.train.data_classification import Classes, Example
from msplora.train.data_files import DataError
from msplora.train.data_images import LabelledImage, read_images
from msplora.train.data_preference import Pair, read_preferences
from msplora.train.data_sft import Sample, read_sft
from msplora.train.held_out_rows import HeldOutRows
from msplora.train.saved_run import SavedRun
from msplora.train.settings import Settings
from msplora.train.settings_file import make_settings
from msplora.train.task_record import TaskRecord
from runs import answered_rows, labelled_rows, write_jsonl
from tiny_images import paint

CHAT = Sample("b, line 2", messages=({"role": "user", "content": "w1"},), tools=({"name": "f"},))
ROWS: dict[str, Any] = {
    "sample": Sample("a, line 1", "w1", " w2"),
    "chat": CHAT,
    "pair": Pair(Sample("a, line 1", "w1", " w2"), Sample("a, line 1", "w1", " w3")),
    "example": Example("a, line 1", ("w1", "w2"), 1),
    "bytes": LabelledImage("a, row 1", b"png", 0),
    "in memory": LabelledImage("a, row 1", Image.new("RGB", (2, 2)), 0),
}
OTHERS: dict[str, Any] = {
    "sample": Sample("a, line 1", "w1", " w3"),
    "chat": replace(CHAT, tools=({"name": "g"},)),
    "pair": Pair(Sample("a, line 1", "w1", " w2"), Sample("a, line 1", "w1", " w4")),
    "example": Example("a, line 1", ("w1", "w2"), 0),
    "bytes": LabelledImage("a, row 1", b"gif", 0),
    "in memory": LabelledImage("a, row 1", Image.new("RGB", (2, 2), "red"), 0),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_known_by_what_they_say_wherever_they_stand(kind: str) -> None:
    row, other = ROWS[kind], OTHERS[kind]
    found = HeldOutRows.of([row, row])
    if kind == "pair":
        moved: Any = Pair(replace(row.chosen, place="z"), replace(row.rejected, place="z"))
    else:
        moved = replace(row, place="z")
    assert HeldOutRows.of([moved, row]) == found
    assert HeldOutRows.of([row, other]) != found
    assert HeldOutRows.of([other, row]) != HeldOutRows.of([row, other])
    assert HeldOutRows.of([row]) != found


def test_the_checksum_is_the_one_that_runs_have_kept_until_now() -> None:
    """Where this fails, runs that were kept are refused: their rows have to stay the same rows."""
    rows = [ROWS[kind] for kind in ("sample", "chat", "pair", "example", "bytes")]
    assert HeldOutRows.of(rows) == HeldOutRows(5, 3893337924)


def test_an_image_is_known_by_its_folder_name_and_size(tmp_path: Path) -> None:
    first, second = tmp_path / "one/red", tmp_path / "two/red"
    for folder in (first, second):
        folder.mkdir(parents=True)
        paint(folder / "a.png", "red", 0)
    found = [HeldOutRows.of([LabelledImage("", str(its / "a.png"), 0)]) for its in (first, second)]
    assert found[0] == found[1]
    Image.new("RGB", (40, 30), "red").save(second / "a.png")
    assert HeldOutRows.of([LabelledImage("", str(second / "a.png"), 0)]) != found[0]


def settings_of(task: str, train: Path) -> Settings:
    data = {"train": str(train), "validation_fraction": 0.3}
    return make_settings({"model": "m", "task": task, "output": "run", "data": data}, "a test")


def preferences(count: int) -> list[dict[str, str]]:
    rows = answered_rows(count)
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " w1"} for row in rows
    ]


def colours(folder: Path, count: int) -> Path:
    for colour in ("blue", "red"):
        (folder / colour).mkdir(parents=True, exist_ok=True)
        for shade in range(count):
            paint(folder / f"{colour}/{shade}.png", colour, shade)
    return folder


def run_on(task: str, folder: Path) -> SavedRun:
    """What is left of a run of ten rows, without its model: the rows are read before it is used."""
    file, classes, forms = folder / "rows.jsonl", None, ("prompt-completion",)
    if task == "sft":
        settings = settings_of(task, write_jsonl(file, answered_rows(10)))
        held_out: Any = read_sft(settings.data, settings.seed).held_out
    elif task == "dpo":
        settings = settings_of(task, write_jsonl(file, preferences(10)))
        held_out = read_preferences(settings.data, settings.seed).held_out
    elif task == "classification":
        settings = settings_of(task, write_jsonl(file, labelled_rows(10)))
        # In another order than that of the alphabet, as an adapter to start from may have them.
        classes = Classes(("text",), "label", ("good", "bad"))
        data = settings.data.model_copy(update={"labels": list(classes.labels)})
        held_out = labelled_data(settings.model_copy(update={"data": data})).held_out
    else:
        settings = settings_of(task, colours(folder / "images", 5))
        _, held_out, classes = read_images(settings.data, settings.seed)
    record = TaskRecord(settings, classes, forms, held_out=HeldOutRows.of(held_out))  # type: ignore[arg-type]
    return SavedRun(folder / "run", None, None, record)  # type: ignore[arg-type]


READERS = {
    "sft": evaluation.token_rows,
    "dpo": evaluation.pair_rows,
    "classification": evaluation.text_rows,
    "image-classification": evaluation.image_rows,
}


@pytest.mark.parametrize("task", READERS)
def test_rows_of_data_that_changed_are_not_called_held_out(task: str, tmp_path: Path) -> None:
    run = run_on(task, tmp_path)

    class Read(Exception):
        """The model would be used now."""

    class Model:
        def __getattr__(self, name: str) -> Any:
            raise Read

    run.base = Model()  # type: ignore[assignment]
    with pytest.raises(Read):  # they are the same rows
        READERS[task](run, None)
    if task == "image-classification":
        named = colours(tmp_path / "images", 9)
    else:
        more = {"sft": answered_rows, "dpo": preferences, "classification": labelled_rows}[task](30)
        named = write_jsonl(tmp_path / "rows.jsonl", more)
    with pytest.raises(DataError, match="it changed since") as refused:
        READERS[task](run, None)
    assert str(named) in str(refused.value)
    assert "held out 3 rows" in str(refused.value)
    assert "--data" in str(refused.value)


def test_a_record_without_it_is_read_and_what_cannot_be_told_is_said(tmp_path: Path) -> None:
    run = run_on("sft", tmp_path)
    run.record.save(tmp_path)
    assert TaskRecord.load(tmp_path) == run.record
    assert evaluation._held_out_in_words(run) == "held out by the run"
    content = json.loads((tmp_path / "task.json").read_text())
    del content["held_out"], content["start"]
    (tmp_path / "task.json").write_text(json.dumps(content))
    old = TaskRecord.load(tmp_path)
    assert old is not None
    run = replace(run, record=old)
    assert "if its data are unchanged" in evaluation._held_out_in_words(run)
    assert evaluation._held_out(run, [1, 2]) == [1, 2]
