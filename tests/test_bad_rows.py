"""Rows that a run cannot use: an error that names them, or counted and left out."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from msplora.errors import ConfigError
from msplora.train.data_files import DataError
from msplora.train.data_report import DataReport, data_report
from msplora.train.settings_file import make_settings
from runs import save_encoder, write_jsonl
from tiny_saved import save_language_model

ADVICE = " To count such rows and leave them out, set data.bad_rows: drop."

# Refuses turns that do not alternate, as Llama 2's does.
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of bytes with a chat template, and an encoder; neither has weights."""
    folder = tmp_path_factory.mktemp("bases")
    save_language_model(folder / "sft", chats=True)
    (folder / "sft/chat_template.jinja").write_text(ALTERNATING)
    save_encoder(folder / "classification")
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    return folder


def report(bases: Path, train: Any, task: str = "sft", **data: Any) -> DataReport:
    content = {
        "model": str(bases / ("sft" if task == "dpo" else task)),
        "task": task,
        "output": "run",
        "data": {"train": train, **data},
    }
    return data_report(make_settings(content, "x.yaml"))


def turns(*roles: str, content: Any = "Hello.") -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role in roles]


def chat(number: int) -> dict[str, Any]:
    return {"messages": turns("user", "assistant", content=f"Hello {number}.")}


def pair(number: int) -> dict[str, Any]:
    return {"prompt": f"What is {number}?", "chosen": f" {number}.", "rejected": " Nothing."}


def alpaca(number: int) -> dict[str, Any]:
    return {"instruction": f"Say {number}.", "input": "", "output": str(number)}


def labelled(number: int) -> dict[str, Any]:
    return {"text": f"w{number} w2", "label": ("bad", "good")[number % 2]}


HALF = "It is \ud83d."
"""With half of an emoji, as JSON may have it."""

GOOD = {"sft": chat, "alpaca": alpaca, "dpo": pair, "classification": labelled}

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("sft", {"messages": []}, "'messages' (or 'conversations') must be a list of turns"),
    ("sft", {"conversations": []}, "'messages' (or 'conversations') must be a list of turns"),
    ("sft", {"messages": None}, "'messages' is null."),
    ("sft", {"conversations": None}, "'conversations' is null."),
    ("sft", {"messages": turns("user")}, "no turn of the assistant, so nothing to learn"),
    ("sft", {"messages": turns("user", "assistant", content=None)}, "turn 1: the content is null"),
    ("sft", {"messages": turns("user", "asistant")}, "turn 2: role 'asistant' is none of"),
    ("sft", {"messages": turns("user", "user", "assistant")}, "the chat template refuses the chat"),
    ("alpaca", {**alpaca(0), "output": None}, "'output' is null."),
    ("alpaca", {"instruction": None, "output": None}, "'instruction' and 'output' are null."),
    ("alpaca", {**alpaca(0), "output": 5}, "'output' holds a int, not text"),
    ("alpaca", {"something": "else"}, "the columns something fit no form"),
    ("alpaca", {**alpaca(0), "output": HALF}, "half a character, '\\ud83d', is no text"),
    ("alpaca", {**alpaca(0), "history": [[HALF, "x"]]}, "half a character"),
    ("sft", {"messages": turns("user", "assistant", content=HALF)}, "half a character"),
    ("dpo", {**pair(0), "rejected": HALF}, "half a character"),
    ("classification", {"text": HALF, "label": "good"}, "half a character"),
    ("dpo", {**pair(0), "chosen": None}, "'chosen' is null."),
    ("dpo", {**pair(0), "prompt": None}, "'prompt' is null."),
    ("dpo", {**pair(0), "rejected": 5}, "'rejected' must be text"),
    ("classification", {"text": None, "label": "good"}, "the text in the column 'text' is null."),
    ("classification", {"text": "w1", "label": None}, "no label in the column 'label'."),
    ("classification", {"text": "w1"}, "no column 'label'"),
    ("classification", {"label": "good"}, "no column 'text'"),
]


@pytest.mark.parametrize(("kind", "bad", "said"), BAD)
def test_a_bad_row_is_an_error_that_names_it_or_counted_and_left_out(
    bases: Path, tmp_path: Path, kind: str, bad: dict[str, Any], said: str
) -> None:
    good = [GOOD[kind](number) for number in range(4)]
    task = "sft" if kind == "alpaca" else kind
    without = str(write_jsonl(tmp_path / "good.jsonl", good))
    file = str(write_jsonl(tmp_path / "rows.jsonl", [*good[:2], bad, good[2], bad, good[3]]))
    data = {"validation": without}
    with pytest.raises(DataError) as caught:
        report(bases, file, task, **data)
    assert str(caught.value).startswith(f"{file}, line 3")
    assert said in str(caught.value)
    assert str(caught.value).endswith((f".{ADVICE}", f"?{ADVICE}"))

    expected = report(bases, without, task, **data)
    found = report(bases, file, task, bad_rows="drop", **data)
    assert asdict(found.check.training) == asdict(expected.check.training)
    assert found.check.repeated_in_training == expected.check.repeated_in_training
    assert found.check.held_out_in_training.rows == expected.check.held_out_in_training.rows
    assert len(found.check.warnings) == len(expected.check.warnings)
    assert [its.plain for its in found.samples] == [its.plain for its in expected.samples]
    counted = found.check.to_dict()["bad_rows"]
    assert (counted["rows"], counted["example"]["row"]) == (2, f"{file}, line 3")
    assert said in counted["example"]["reason"]
    (note,) = [its for its in found.notes if its.startswith("left out: ")]
    assert note.startswith(f"left out: 2 bad rows (data.bad_rows: drop), as {file}, line 3: ")
    assert said in note
    assert expected.check.bad_rows == {"rows": 0, "example": None}
    assert not any(its.startswith("left out") for its in expected.notes)


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("sft", {"messages": turns("user", "user", "assistant")}),
        ("sft", {"messages": turns("user")}),
        ("alpaca", {**alpaca(0), "output": None}),
        ("dpo", {**pair(0), "rejected": 5}),
        ("classification", {"text": None, "label": "good"}),
    ],
)
def test_where_nothing_is_left_is_an_error(
    bases: Path, tmp_path: Path, kind: str, bad: dict[str, Any]
) -> None:
    task = "sft" if kind == "alpaca" else kind
    good = str(write_jsonl(tmp_path / "good.jsonl", map(GOOD[kind], range(4))))
    rows = [bad, bad | ({"label": "bad"} if task == "classification" else {})]
    file = str(write_jsonl(tmp_path / "bad.jsonl", rows))
    for data in ({"train": file, "validation": good}, {"train": good, "validation": file}):
        with pytest.raises(DataError) as caught:
            report(bases, task=task, bad_rows="drop", **data)
        what = "training" if data["train"] == file else "held-out"
        said = str(caught.value)
        assert said.startswith((f"no {what} row is left; 2 bad rows", f"{file}, line 1: "))
        assert f"{file}, line 1: " in said


def test_a_bad_row_counts_once_however_often_its_source_is_seen(
    bases: Path, tmp_path: Path
) -> None:
    rows = [chat(1), {"messages": turns("user", "user", "assistant")}, {"messages": []}, chat(2)]
    file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    train = [{"path": file, "weight": 3}]
    found = report(bases, train, bad_rows="drop", validation_fraction=0).check
    assert found.training.rows == 6
    assert found.bad_rows["rows"] == 2
    assert found.empty == {}


def test_rows_of_which_some_are_held_out_give_the_same_whatever_the_order_of_their_parts(
    bases: Path, tmp_path: Path
) -> None:
    rows = [chat(number) if number % 3 else {"messages": None} for number in range(30)]
    file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    found = report(bases, file, bad_rows="drop", validation_fraction=0.3).check
    assert found.held_out
    assert found.training.rows + found.held_out.rows == 20
    assert found.bad_rows["rows"] == 10


def test_a_number_in_a_parquet_is_not_told_to_take_quotes(bases: Path, tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": ["p", "q"], "completion": [1, 2]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"row 1: 'completion' holds a int, not text\. Write it as"):
        report(bases, str(tmp_path / "rows.parquet"), validation_fraction=0)


def test_what_every_row_lacks_is_not_advised_to_be_left_out(bases: Path, tmp_path: Path) -> None:
    for kind, rows in (("sft", [{"promt": "a", "completion": "b"}] * 2), ("sft", [{"a": None}])):
        file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
        for policy in ("error", "drop"):
            with pytest.raises(DataError, match=r"line 1: the columns .* fit no form") as caught:
                report(bases, file, kind, bad_rows=policy, validation_fraction=0)
            assert "bad_rows" not in str(caught.value)
    for policy in ("error", "drop"):
        file = str(write_jsonl(tmp_path / "rows.jsonl", map(labelled, range(4))))
        with pytest.raises(DataError, match=r"no column 'labl' \(data.label_column\)") as caught:
            report(bases, file, "classification", label_column="labl", bad_rows=policy)
        assert "bad_rows" not in str(caught.value)


def test_a_first_row_without_a_text_is_a_bad_row_too(bases: Path, tmp_path: Path) -> None:
    good = str(write_jsonl(tmp_path / "good.jsonl", map(labelled, range(4))))
    rows = [{"label": "good"}, labelled(0), labelled(1)]
    file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    found = report(bases, file, "classification", bad_rows="drop", validation=good)
    assert found.check.bad_rows["rows"] == 1


def test_a_text_of_no_token_is_a_bad_row(bases: Path, tmp_path: Path) -> None:
    base = shutil.copytree(bases / "classification", tmp_path / "classification")
    file = base / "tokenizer.json"
    plain = json.loads(file.read_text()) | {
        "post_processor": None
    }  # nothing put around, as GPT-2's
    file.write_text(json.dumps(plain))
    good = str(write_jsonl(tmp_path / "good.jsonl", map(labelled, range(4))))
    rows = [labelled(0), {"text": "", "label": "good"}, labelled(1)]
    bad = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    with pytest.raises(DataError, match=r"line 2: the text is empty, and the tokenizer puts no"):
        report(tmp_path, bad, "classification", validation=good)
    for data in ({"train": bad, "validation": good}, {"train": good, "validation": bad}):
        found = report(tmp_path, task="classification", bad_rows="drop", **data).check
        assert found.bad_rows["rows"] == 1
        assert found.empty == {}


def test_a_chat_without_a_template_is_no_bad_row(bases: Path, tmp_path: Path) -> None:
    base = save_language_model(tmp_path / "sft")
    file = str(write_jsonl(tmp_path / "rows.jsonl", map(chat, range(4))))
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        report(base.parent, file, bad_rows="drop")


def test_json_has_what_was_left_out(bases: Path, tmp_path: Path) -> None:
    rows = [chat(1), {"messages": []}, chat(2)]
    file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    found = report(bases, file, bad_rows="drop", validation_fraction=0).check
    assert json.loads(json.dumps(found.to_dict()))["bad_rows"] == {
        "rows": 1,
        "example": {
            "row": f"{file}, line 2",
            "reason": "'messages' (or 'conversations') must be a list of turns and hold at least "
            "one.",
        },
    }
