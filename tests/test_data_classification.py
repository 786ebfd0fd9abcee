"""Texts and labels to model inputs; and the metrics, against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as hf

from msplora.errors import ConfigError
from msplora.train.data_classification import Classes, examples, fit_columns, read_classification
from msplora.train.data_files import DataError, Row
from msplora.train.lengths import Limit
from msplora.train.metrics import metrics_for, predictions
from msplora.train.settings_data import DataSettings
from msplora.train.tokenise_classification import tokenise_examples
from runs import save_encoder, write_jsonl


def read(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Any:
    file = write_jsonl(folder / "rows.jsonl", rows)
    return read_classification(DataSettings(train=str(file), **changes), seed=0)


def rows_of(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"text": f"w{place}", "label": label} for place, label in enumerate(labels)]


def test_classes_are_those_of_the_rows_numbers_by_value(tmp_path: Path) -> None:
    words = read(tmp_path, rows_of(["b", "a", "c"] * 3)).classes
    assert words.labels == ("a", "b", "c")
    found = read(tmp_path, rows_of([10, 9, 2, 1] * 3))
    assert found.classes.labels == ("1", "2", "9", "10")
    by_text = {example.texts[0]: example.label for example in (*found.train, *found.held_out)}
    assert [by_text[f"w{place}"] for place in range(4)] == [3, 2, 1, 0]


def test_named_classes_keep_their_order(tmp_path: Path) -> None:
    found = read(tmp_path, rows_of(["no", "yes"] * 4), labels=["yes", "no"])
    assert found.classes.labels == ("yes", "no")
    assert {
        example.label for example in (*found.train, *found.held_out) if example.texts == ("w0",)
    } == {1}


def test_a_class_whose_rows_are_all_held_out_is_a_class_all_the_same(tmp_path: Path) -> None:
    for rows in (rows_of(["a", "b"]), rows_of(["a", "a", "b"])):
        found = read(tmp_path, rows, validation_fraction=0.1)
        assert found.classes.labels == ("a", "b")
        assert len(found.held_out) == 1
    with pytest.raises(
        DataError, match=r"rows\.jsonl: the column 'label' holds 1 class\(es\) \(a\)"
    ):
        read(tmp_path, rows_of(["a", "a"]))


@pytest.mark.parametrize(
    ("columns", "given", "found"),
    [
        (("#1 String", "#2 String"), ("#1 String", "#2 String", "Quality"), None),
        (("#1 String", "#2 String"), ("idx", "sentence2", "sentence1"), ("sentence1", "sentence2")),
        (("#1 String", "#2 String"), ("left", "right"), ("left", "right")),
        (("#1 String", "#2 String"), ("label", "left", "right"), ("left", "right")),
        (("#1 String", "#2 String"), ("left", "middle", "right"), None),
        (("review",), ("text", "id"), ("text",)),
        (("review",), ("comment",), ("comment",)),
        (("review",), ("text", "review"), None),
    ],
)
def test_columns_of_other_names_stand_for_those_of_the_run(
    columns: tuple[str, ...], given: tuple[str, ...], found: tuple[str, ...] | None
) -> None:
    classes = Classes(columns, "Quality", ("0", "1"))
    fitted = fit_columns([Row("x", dict.fromkeys(given, "a"))], classes)
    assert fitted.text_columns == (found or columns)
    assert fitted.label_column == ("label" if "label" in given else "Quality")


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (["text"], ("text",)),
        (["sentence1", "sentence2"], ("sentence1", "sentence2")),
        (["question", "sentence"], ("question", "sentence")),
        (["sentence"], ("sentence",)),
    ],
)
def test_the_usual_columns_of_text_are_found(
    tmp_path: Path, columns: list[str], found: tuple[str, ...]
) -> None:
    rows = [dict.fromkeys(columns, "w") | {"label": str(place % 2)} for place in range(6)]
    assert read(tmp_path, rows).classes.text_columns == found


@pytest.mark.parametrize(
    ("labels", "listed", "classes", "found"),
    [
        ([1, 0, 1.0, 0.0], None, ("0", "1"), [1, 0, 1, 0]),
        ([1.0, 0, 0.5, 1], None, ("0", "0.5", "1"), [2, 0, 1, 2]),
        ([1.0, 0, 1, 0.0], ["0.0", "1.0"], ("0.0", "1.0"), [1, 0, 1, 0]),
        (["1.0", "1", 1, 1.0], None, ("1", "1.0"), [1, 0, 0, 0]),  # texts are as they are written
        ([True, False, True, False], None, ("False", "True"), [1, 0, 1, 0]),
    ],
)
def test_a_number_is_one_class_however_it_is_written(
    tmp_path: Path, labels: list[Any], listed: Any, classes: tuple[str, ...], found: list[int]
) -> None:
    file = write_jsonl(tmp_path / "all.jsonl", rows_of(labels))
    data = read(tmp_path, rows_of(labels), labels=listed, validation=str(file))
    assert data.classes.labels == classes
    assert [example.label for example in data.held_out] == found


def test_the_word_nan_stands_behind_the_numbers(tmp_path: Path) -> None:
    labels = ["10", "nan", "9", "inf", "1"]
    assert read(tmp_path, rows_of(labels * 2)).classes.labels == ("1", "9", "10", "inf", "nan")


def test_labels_that_are_no_number_are_missing() -> None:
    classes = Classes(("text",), "label", ("0", "1"))
    with pytest.raises(DataError, match="no label"):
        examples([Row("x", {"text": "t", "label": float("nan")})], classes)


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        ([{"txt": "a", "label": 0}] * 4, {}, "none of the usual columns"),
        (rows_of([0, 1] * 2), {"text_columns": ["texts"]}, "Did you mean 'text'?"),
        (rows_of([0, 1] * 2), {"label_column": "labels"}, "Did you mean 'label'?"),
        ([*rows_of([0, 1] * 2), {"text": "a"}], {}, "line 5: no column 'label'"),
        (rows_of([0] * 4), {}, "holds 1 class"),
        (rows_of(list(range(60))), {}, "hardly classes"),
        (rows_of([0, 1, None, 1]), {"validation_fraction": 0.3}, "line 3: no label"),
        (rows_of(["good", "bad", "goood", "bad"]), {"labels": ["bad", "good"]}, "mean 'good'?"),
        (rows_of([0, 1, 2, 1]), {"labels": ["0", "1"]}, "line 3: label '2' is none of the classes"),
        ([{"text": 3, "label": 0}, *rows_of([0, 1])], {}, "line 1: the column 'text' holds a int"),
        (rows_of([["a"], ["b"]] * 2), {}, "line 1: the column 'label' holds a list; a row has one"),
        (rows_of([0.5, "high", 1.5]), {"regression": True}, "line 2: label 'high' is not a number"),
        (rows_of([0.5, "nan", 1.5]), {"regression": True}, "line 2: label 'nan' is not a number"),
    ],
)
def test_rows_that_cannot_be_classified(
    tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, rows, **changes)
    assert said in str(caught.value)


def test_a_score_outside_glue_s_range_is_refused(tmp_path: Path) -> None:
    header = "sentence1\tsentence2\tscore\n"
    (tmp_path / "train.tsv").write_text(f"{header}a\tb\t5.0\na\tb\t5.1\n")
    (tmp_path / "dev.tsv").write_text(f"{header}a\tb\t0.0\n")
    data = DataSettings(glue="stsb", path=str(tmp_path))
    with pytest.raises(DataError, match=r"train\.tsv, line 3: label 5.1 is outside .* 0 to 5"):
        read_classification(data, 0)


def test_unlabelled_rows_are_read_without_their_label() -> None:
    classes = Classes(("text",), "label", ("a", "b"))
    found = examples([Row("x", {"text": "t", "label": "unknown"})], classes, labelled=False)
    assert found[0].label is None


# Tokens and lengths.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_encoder(tmp_path_factory.mktemp("encoder"))
    return hf.AutoTokenizer.from_pretrained(folder)


PAIR = Classes(("one", "two"), "label", ("a", "b"))


def tokens(tokenizer: Any, rows: list[tuple[str, str]], limit: Limit) -> Any:
    found = examples(
        [
            Row(f"row {place}", {"one": one, "two": two, "label": "b"})
            for place, (one, two) in enumerate(rows, 1)
        ],
        PAIR,
    )
    return tokenise_examples(found, tokenizer, limit, "training")


def test_pairs_become_model_inputs_token_by_token(tokenizer: Any) -> None:
    data, report = tokens(tokenizer, [("w0 w1", "w2")], Limit(32, None, "truncate"))
    decoded = tokenizer.convert_ids_to_tokens(data[0]["input_ids"])
    assert decoded == ["[CLS]", "w0", "w1", "[SEP]", "w2", "[SEP]"]
    assert data[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert data[0]["labels"] == 1
    assert str(report) == "1 rows, the longest of 6 tokens"


def test_truncation_cuts_the_longer_text_and_keeps_the_special_tokens(tokenizer: Any) -> None:
    rows = [("w0 w1 w2 w3 w4", "w5"), ("w6", "w7")]
    data, report = tokens(tokenizer, rows, Limit(32, 6, "truncate"))
    decoded = [tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in data]
    assert decoded == [
        ["[CLS]", "w0", "w1", "[SEP]", "w5", "[SEP]"],
        ["[CLS]", "w6", "[SEP]", "w7", "[SEP]"],
    ]
    assert (report.rows, report.truncated, report.dropped, report.longest) == (2, 1, 0, 9)


def test_dropping_and_refusing_rows_that_are_too_long(tokenizer: Any) -> None:
    rows = [("w0 w1 w2 w3 w4", "w5"), ("w6", "w7")]
    data, report = tokens(tokenizer, rows, Limit(32, 6, "drop"))
    assert len(data) == 1
    assert tokenizer.decode(data[0]["input_ids"]) == "[CLS] w6 [SEP] w7 [SEP]"
    assert "1 dropped as too long" in str(report)
    with pytest.raises(DataError, match=r"row 1: 9 tokens, but data.max_length is 6"):
        tokens(tokenizer, rows, Limit(32, 6, "error"))
    with pytest.raises(DataError, match="no training row is left"):
        tokens(tokenizer, rows[:1], Limit(32, 6, "drop"))


@pytest.mark.parametrize("too_long", ["truncate", "drop", "error"])
def test_a_row_beyond_the_positions_is_an_error_without_max_length(
    tokenizer: Any, too_long: Any
) -> None:
    with pytest.raises(DataError, match=r"row 1: 9 tokens, but the model has 8 positions"):
        tokens(tokenizer, [("w0 w1 w2 w3 w4", "w5")], Limit(8, None, too_long))
    with pytest.raises(ConfigError, match=r"Set data.max_length to 8 or less"):
        Limit(8, 9, too_long).refuse_beyond_positions()


def test_a_length_without_room_for_any_word_is_refused(tokenizer: Any) -> None:
    with pytest.raises((DataError, ConfigError), match="max_length"):
        tokens(tokenizer, [("w0", "w1")], Limit(32, 2, "truncate"))


# Metrics, by hand.


def metrics(task: str | None, predicted: list[float], labels: list[float]) -> dict[str, float]:
    compute, best = metrics_for(task, regression=task == "stsb")
    found = compute(np.array(predicted), np.array(labels))
    assert best in found
    return found


def test_mrpc_is_accuracy_and_f1_of_paraphrases() -> None:
    # 3 of 5 right; of class 1: 2 hits, 1 false alarm, 1 miss.
    found = metrics("mrpc", [1, 1, 0, 0, 1], [1, 0, 0, 1, 1])
    assert found == pytest.approx({"accuracy": 3 / 5, "f1": 2 * 2 / (2 * 2 + 1 + 1)})
    assert metrics("mrpc", [0, 0], [1, 0]) == {"accuracy": 0.5, "f1": 0.0}


def test_cola_is_matthews_correlation() -> None:
    # 2 hits, 1 right rejection, 1 false alarm, 1 miss.
    found = metrics("cola", [1, 1, 0, 0, 1], [1, 0, 0, 1, 1])
    expected = (2 * 1 - 1 * 1) / math.sqrt((2 + 1) * (2 + 1) * (1 + 1) * (1 + 1))
    assert found == pytest.approx({"matthews_correlation": expected, "accuracy": 0.6})
    assert metrics("cola", [1, 1, 1], [1, 0, 1])["matthews_correlation"] == 0.0
    assert metrics_for("cola", False)[1] == "matthews_correlation"


def test_stsb_is_pearson_and_spearman() -> None:
    # Deviations -1.5, -.5, .5, 1.5 and -1.75, .25, -.75, 2.25; ranks 1 2 3 4 and 1 3 2 4.
    found = metrics("stsb", [1, 2, 3, 4], [1, 3, 2, 5])
    assert found == pytest.approx(
        {"pearson": 5.5 / math.sqrt(5 * 8.75), "spearman": 1 - 6 * 2 / (4 * 15)}
    )
    # A constant prediction has no correlation; it must not be a NaN that wins or fails.
    assert metrics("stsb", [2, 2, 2], [1, 2, 3]) == {"pearson": 0.0, "spearman": 0.0}
    assert metrics_for("stsb", True)[1] == "pearson"


@pytest.mark.parametrize("task", ["rte", "sst2", "qnli", None])
def test_the_other_tasks_are_accuracy(task: str | None) -> None:
    assert metrics(task, [1, 0, 2], [1, 1, 2]) == pytest.approx({"accuracy": 2 / 3})


def test_outputs_become_classes_or_numbers() -> None:
    logits = np.array([[0.1, 0.9], [0.8, 0.2]])
    assert predictions(logits, regression=False).tolist() == [1, 0]
    assert predictions((logits, "hidden states"), regression=False).tolist() == [1, 0]
    assert predictions(np.array([[1.5], [2.5]]), regression=True).tolist() == [1.5, 2.5]
