"""Several files with weights: which rows are trained on, how often, and which are held out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from msplora.errors import ConfigError
from msplora.train.data_classification import read_classification
from msplora.train.data_files import DataError, Row
from msplora.train.data_sft import read_sft
from msplora.train.data_sources import absolute_sources, named_sources, repeated
from msplora.train.data_split import read_parts, read_splits
from msplora.train.run import with_absolute_paths
from msplora.train.settings_data import DataSettings, DataSource
from msplora.train.settings_file import make_settings, read_settings, write_settings
from runs import answered_rows, labelled_rows, msplora, save_decoder, write_config, write_jsonl


def numbered(folder: Path, name: str, count: int) -> str:
    rows = [{"text": f"{name} {place}"} for place in range(count)]
    return str(write_jsonl(folder / f"{name}.jsonl", rows))


def texts(rows: list[Row]) -> list[str]:
    return [row["text"] for row in rows]


# Weights.


def test_two_configs_of_a_hub_dataset_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    sources = [DataSource(hub="x", config=its) for its in ("one", "two")]
    found = read_parts(DataSettings(train=sources, validation_fraction=0), 0)
    assert [row.place for part in found.train for row in part.rows] == [
        f"x, {config}, train, row {row}" for config in ("one", "two") for row in (1, 2)
    ]
    assert [part.name for part in found.train] == ["x, one, train", "x, two, train"]


@pytest.mark.parametrize("weight", [0.25, 0.5, 1, 1.5, 3])
def test_a_weight_is_how_often_a_row_is_seen(weight: float) -> None:
    found = Counter(repeated(range(40), weight, "7"))
    assert sum(found.values()) == 40 * weight
    assert set(found.values()) <= {int(weight), int(weight) + 1}
    assert repeated(range(40), weight, "7") == sorted(found.elements())
    drawn = [repeated(range(40), weight, seed) for seed in ("7", "8")]
    assert (drawn[0] == drawn[1]) == float(weight).is_integer()


def test_rows_are_held_out_before_any_is_repeated(tmp_path: Path) -> None:
    data = DataSettings(
        train=[  # pyright: ignore
            numbered(tmp_path, "a", 40),
            {"path": numbered(tmp_path, "b", 20), "weight": 3},
            {"path": numbered(tmp_path, "c", 20), "weight": 0.5},
        ],
        validation_fraction=0.25,
    )
    train, held_out = map(texts, read_splits(data, 5))
    assert len(held_out) == len(set(held_out)) == 20
    assert not set(train) & set(held_out)
    seen = Counter(text[0] for text in train)
    held = Counter(text[0] for text in held_out)
    assert seen["a"] + held["a"] == 40
    assert seen["b"] == 3 * (20 - held["b"])
    assert seen["c"] == round((20 - held["c"]) / 2)
    assert (train, held_out) == tuple(map(texts, read_splits(data, 5)))


def test_the_first_rows_of_each_source_make_a_quick_try(tmp_path: Path) -> None:
    sources = [numbered(tmp_path, "a", 10), numbered(tmp_path, "b", 10)]
    data = DataSettings(train=sources, validation=sources, max_rows=2)  # pyright: ignore
    for rows in read_splits(data, 0):
        assert texts(rows) == ["a 0", "a 1", "b 0", "b 1"]


def test_a_whole_text_and_a_table_mix(tmp_path: Path) -> None:
    story = tmp_path / "story.txt"
    story.write_text("".join(f"line {place}\n" for place in range(50)))
    rows = numbered(tmp_path, "a", 20)
    data = DataSettings(
        train=[{"path": str(story), "weight": 2}, rows],  # pyright: ignore
        validation_fraction=0.1,
    )
    found = read_sft(data, 0)
    whole = [sample for sample in found.train if sample.whole_text]
    (end,) = [sample for sample in found.held_out if sample.whole_text]
    assert len(whole) == 2
    assert whole[0] == whole[1]
    assert whole[0].completion + end.completion == story.read_text()
    assert len(found.train) + len(found.held_out) == 2 + 1 + 20
    assert [source.form for source in found.sources] == ["text-file", "text"]
    data = data.model_copy(update={"train": [DataSource(path=str(story), weight=0.5)]})
    with pytest.raises(DataError, match="its weight is a whole number"):
        read_sft(data, 0)


def test_every_source_has_its_own_form_and_columns(tmp_path: Path) -> None:
    chats = write_jsonl(
        tmp_path / "chats.jsonl",
        [{"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}] * 2,
    )
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"question": "q", "answer": "b"}] * 2)
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"text": "t"}] * 2)
    columns = {"prompt": "question", "completion": "answer"}
    data = DataSettings(
        train=[str(plain), str(chats), {"path": str(asked), "columns": columns}],  # pyright: ignore
        validation=str(plain),
    )
    found = read_sft(data, 0)
    assert [source.form for source in found.sources] == ["text", "messages", "prompt-completion"]
    assert [sample.text for sample in found.train] == [
        *["t"] * 2, *["user: u\nassistant: a"] * 2, *["qb"] * 2
    ]  # fmt: skip
    assert [sample.text for sample in found.held_out] == ["t"] * 2
    # The first is what a prompt of msplora generate is put into.
    assert found.forms == ("messages", "prompt-completion", "text")


def test_classes_are_those_of_all_sources(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", labelled_rows(10))
    second = write_jsonl(tmp_path / "b.jsonl", labelled_rows(10, ("bad", "odd")))
    data = DataSettings(train=[str(first), {"path": str(second), "weight": 2}])  # pyright: ignore
    found = read_classification(data, 0)
    assert found.classes.labels == ("bad", "good", "odd")
    assert [source.weight for source in found.sources] == [1, 2]
    assert sum(source.train for source in found.sources) == len(found.train)


# Patterns, paths and the file.


def test_a_pattern_is_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b", "a", "deep/c"):
        numbered(tmp_path, name, 1)
    (tmp_path / "folder.jsonl").mkdir()
    for pattern, names in (("*.jsonl", ["a", "b"]), ("**/*.jsonl", ["a", "b", "deep/c"])):
        found = named_sources(str(tmp_path / pattern), "data.train")
        assert [its.path for its in found] == [str(tmp_path / f"{name}.jsonl") for name in names]
    weighted = [DataSource(path=str(tmp_path / "*.jsonl"), weight=2)]
    assert [its.weight for its in named_sources(weighted, "data.train")] == [2, 2]
    odd = numbered(tmp_path, "odd [1]", 1)  # a file of such a name is that file
    assert [its.path for its in named_sources(odd, "data.train")] == [odd]
    with pytest.raises(DataError, match=r"data\.train: no file matches the pattern .*tsv"):
        named_sources(str(tmp_path / "*.tsv"), "data.train")
    with pytest.raises(DataError, match=r"names .*a\.jsonl twice"):
        named_sources([*weighted, DataSource(path=str(tmp_path / "a.jsonl"))], "data.train")
    spelled = [DataSource(path=str(tmp_path / its)) for its in ("a.jsonl", "deep/../a.jsonl")]
    with pytest.raises(DataError, match=r"names .*deep/\.\./a\.jsonl twice"):
        named_sources(spelled, "data.train")


def test_paths_are_recorded_absolute_and_patterns_as_what_they_matched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    numbered(tmp_path, "a", 1)
    assert absolute_sources("a.jsonl", "data.train") == str(tmp_path / "a.jsonl")
    found = absolute_sources("*.jsonl", "data.train")
    numbered(tmp_path, "later", 1)
    assert isinstance(found, list)
    assert [its.path for its in found] == [str(tmp_path / "a.jsonl")]
    mixed = [DataSource(path="a.jsonl", weight=2), DataSource(hub="some/set")]
    mixed = absolute_sources(mixed, "data.train")
    assert isinstance(mixed, list)
    assert [its.path for its in mixed] == [str(tmp_path / "a.jsonl"), None]
    assert mixed[1].hub == "some/set"


BASE = {"model": "m", "task": "sft", "output": "o"}


def test_settings_are_written_as_one_would_and_read_again(tmp_path: Path) -> None:
    numbered(tmp_path, "a", 1)
    train = [
        str(tmp_path / "a.jsonl"),
        {"path": "b.jsonl", "weight": 0.5, "columns": {"prompt": "q"}},
        {"hub": "some/set", "split": "test", "config": "en"},
    ]
    settings = make_settings({**BASE, "data": {"train": train}}, "x.yaml")
    write_settings(settings, tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["train"] == train
    assert read_settings(tmp_path / "config.yaml") == settings
    absolute = with_absolute_paths(settings.model_copy(update={"model": "some/model"}))
    assert isinstance(absolute.data.train, list)
    assert absolute.data.train[1].weight == 0.5


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": []}, "data.train = []: List should have at least 1 item"),
        ({"train": 3}, "data.train = 3: it takes a path, or a list of paths"),
        ({"train": {"path": "a"}}, "it takes a path, or a list of paths"),
        ({"train": ["a", 3]}, "data.train, entry 2 = 3: it takes a path or a mapping"),
        ({"train": [{"weight": 2}]}, "entry 1 = {'weight': 2}: it needs one of path and hub"),
        ({"train": [{"path": "a", "hub": "b"}]}, "it needs one of path and hub"),
        ({"train": [{"path": "a", "split": "b"}]}, "split is for a hub dataset"),
        ({"train": [{"path": "a", "wieght": 2}]}, "unknown key 'wieght'. Did you mean 'weight'?"),
        ({"train": [{"path": "a", "weight": 0}]}, "weight = 0: it should be greater than 0"),
        ({"train": [{"path": "a", "weight": float("inf")}]}, "a finite number"),
        ({"train": "a", "validation": [{"path": "b", "weight": 2}]}, "Leave its weight out"),
        ({"train": "a", "columns": {"inputs": "b"}}, "'inputs', which is a field of no form. Did"),
        ({"train": [{"path": "a", "columns": {"ctx": "b"}}]}, "'ctx', which is a field of no form"),
    ],
)
def test_sources_that_cannot_be_meant(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_settings({**BASE, "data": data}, "x.yaml")
    assert said in str(caught.value)


@pytest.mark.parametrize("key", ["train", "validation"])
def test_a_classifier_has_no_columns_of_one_source(key: str) -> None:
    data = {"train": "a", key: [{"path": "b", "columns": {"text": "body"}}]}
    content = {**BASE, "task": "classification", "data": data}
    with pytest.raises(ConfigError, match=f"data.{key}, entry 1: columns are for task 'sft'"):
        make_settings(content, "x.yaml")


def test_a_weight_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    source = DataSource(path=numbered(tmp_path, "a", 10), weight=0.01)
    with pytest.raises(DataError, match=r"a\.jsonl: a weight of 0.01 leaves none of its 9 rows"):
        read_parts(DataSettings(train=[source]), 0)


# A run.


def test_a_run_of_several_sources_is_judged_again_by_the_same_rows(tmp_path: Path) -> None:
    rows = answered_rows(60)
    write_jsonl(tmp_path / "part-1.jsonl", rows[:30])
    write_jsonl(tmp_path / "part-2.jsonl", rows[30:])
    plain = [{"text": row["prompt"]} for row in rows[:20]]
    write_jsonl(tmp_path / "plain.jsonl", plain)
    content = {
        "model": str(save_decoder(tmp_path / "base")),
        "task": "sft",
        "output": str(tmp_path / "run"),
        "data": {
            "train": [
                str(tmp_path / "part-*.jsonl"),
                {"path": str(tmp_path / "plain.jsonl"), "weight": 2},
            ]
        },
        "training": {"max_steps": 2, "batch_size": 4},
    }
    result = msplora("train", write_config(tmp_path / "run.yaml", content))
    assert result.code == 0, result.err
    assert "plain.jsonl: form text" in result.out
    assert "(weight 2)" in result.out
    write_jsonl(tmp_path / "part-3.jsonl", answered_rows(5))  # not of the run
    best = json.loads((tmp_path / "run/metrics.json").read_text())["best"]
    found = msplora("eval", tmp_path / "run", "--json").json()
    assert found["loss"] == pytest.approx(best["loss"], rel=1e-6)
    assert found["tokens"] == best["tokens"]
    # Files of either form, and of another, are told apart by their fields.
    for file in ("part-1.jsonl", "plain.jsonl"):
        assert msplora("eval", tmp_path / "run", "--data", tmp_path / file).code == 0
    sources = json.loads((tmp_path / "run/data.json").read_text())["sources"]
    assert [source["form"] for source in sources] == ["prompt-completion"] * 2 + ["text"]
    assert sum(source["held_out"] for source in sources) == 8
