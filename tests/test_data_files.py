"""Rows from files and from the hub: what is read, and where a fault is said to be."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from msplora.train.data_files import DataError, read_hub, read_rows
from msplora.train.data_glue import GLUE, read_glue, read_glue_file
from msplora.train.data_split import hold_out, read_splits
from msplora.train.evaluation import evaluate_run
from msplora.train.settings_data import DataSettings


def zipped(content: str) -> bytes:
    return gzip.compress(content.encode(), mtime=0)


def as_parquet(folder: Path, records: list[dict[str, Any]], name: str = "a.parquet") -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(records), folder / name)
    return folder / name


def data(**changes: Any) -> DataSettings:
    return DataSettings(**changes)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


RECORDS = [{"text": 'a "b', "label": "1"}, {"text": "c, d", "label": "0"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", 'text\tlabel\na "b\t1\nc, d\t0\n'),
        ("a.tsv", 'text\tlabel\r\na "b\t1\r\n\r\nc, d\t0'),
        ("a.tsv", b'\xef\xbb\xbftext\tlabel\na "b\t1\nc, d\t0\n'),
        ("a.csv", 'text,label\n"a ""b",1\n"c, d",0\n'),
        ("a.csv", b'\xef\xbb\xbftext,label\n"a ""b",1\n\n"c, d",0\n'),
        ("a.jsonl", "\n".join(map(json.dumps, RECORDS)) + "\n\n"),
        ("a.json", json.dumps(RECORDS)),
        ("a.json", json.dumps({"version": 1, "data": RECORDS})),
        ("a.JSON", json.dumps(RECORDS)),
        ("a.jsonl.gz", zipped("\n".join(map(json.dumps, RECORDS)))),
        ("a.json.GZ", zipped(json.dumps(RECORDS))),
        ("a.tsv.gz", zipped('\ufefftext\tlabel\r\na "b\t1\r\nc, d\t0')),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert [row.values for row in read_rows(written(tmp_path, name, content))] == RECORDS


def test_a_row_knows_its_line(tmp_path: Path) -> None:
    tsv = written(tmp_path, "a.tsv", "x\ty\n\n1\t2\n3\t4\n")
    assert [row.place for row in read_rows(tsv)] == [f"{tsv}, line 3", f"{tsv}, line 4"]
    csv = written(tmp_path, "a.csv", 'x\n"two\nlines"\nthen\n')
    assert [row.place for row in read_rows(csv)] == [f"{csv}, line 2", f"{csv}, line 4"]


def test_a_tsv_quotes_nothing_and_ends_lines_at_line_ends_only(tmp_path: Path) -> None:
    text = 'an "open quote'
    odd = "one\u2028sentence\x85still"  # str.splitlines would cut it
    rows = read_rows(written(tmp_path, "a.tsv", f"text\n{text}\n{odd}\n"))
    assert [row["text"] for row in rows] == [text, odd]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", "", "is empty"),
        ("a.tsv", " \n\n", "is empty"),
        ("a.tsv", "text\tlabel\n", "only a header"),
        ("a.jsonl", "\n", "is empty"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", "3", "a list of objects"),
        ("a.json", '{"a": 1}', "0 lists"),
        ("a.json", '[{"a": 1}, 2]', "row 2: found a int, expected an object"),
        ("a.json", '{"a": 1}\n{"a": 2}', "name the file .jsonl"),
        ("a.json", '[{"a": }]', "line 1: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n{"a"\n', "line 2: not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1: found a list"),
        ("a.tsv", "a\tb\n1\t2\n1\n", "line 3: 1 fields, but the header has 2"),
        ("a.csv", "a,b\n1,2,3\n", "line 2: 3 fields, but the header has 2"),
        ("a.csv", 'a\n"open\n', "line 2: not valid CSV"),
        ("a.tsv", "a\ta\n1\t2\n", "the header names a more than once"),
        ("a.tsv", b"a\n\xff\n", "not UTF-8"),
        ("a.parquet", "a", "no whole parquet file"),
        ("a.xlsx", "a", "cannot read .xlsx"),
        ("a", "a", "a file without suffix"),
        ("a.gz", "a", "a file without suffix"),
        ("a.jsonl.gz", '{"a": 1}\n', "no whole gzip file"),
        ("a.jsonl.gz", zipped('{"a": 1}\n' * 99)[:-9], "no whole gzip file"),
        ("a.jsonl.gz", zipped('{"a": 1}\n{"a"\n'), "line 2: not valid JSON"),
        ("a.parquet.gz", zipped("a"), "parquet compresses by itself"),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_why(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    file = written(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read_rows(file)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


def test_parquet_gives_plain_objects_however_deep(tmp_path: Path) -> None:
    records = [
        {"text": "a", "label": 1, "turns": [{"role": "user", "content": "b"}]},
        {"text": None, "label": 2, "turns": []},
    ]
    (tmp_path / "split=train").mkdir()  # which is no column
    file = as_parquet(tmp_path, records, "split=train/a.parquet")
    rows = read_rows(file)
    assert [row.values for row in rows] == records
    assert [row.place for row in rows] == [f"{file}, row 1", f"{file}, row 2"]


def test_parquet_knows_the_names_of_classes_that_datasets_wrote(tmp_path: Path) -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    content = datasets.Dataset.from_dict({"label": [1, 0, None]}, features=features)
    content.to_parquet(tmp_path / "a.parquet")
    assert [row["label"] for row in read_rows(tmp_path / "a.parquet")] == ["yes", "no", None]


def test_parquet_that_is_cut_short_or_empty_is_refused(tmp_path: Path) -> None:
    file = as_parquet(tmp_path, RECORDS * 50)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet is no whole parquet file"):
        read_rows(file)
    schema = pyarrow.schema([("text", pyarrow.string())])
    parquet.write_table(schema.empty_table(), file)
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(file)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    written(tmp_path, "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"does not exist. Did you mean .*train\.jsonl"):
        read_rows(tmp_path / "trian.jsonl")
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path / "folder.tsv")


def test_holding_out_is_a_partition_that_the_seed_decides() -> None:
    items = list(range(50))
    train, held_out = hold_out(items, 0.1, seed=3)
    assert sorted(train + held_out) == items
    assert train == sorted(train)
    assert held_out == sorted(held_out)
    assert len(held_out) == 5
    assert hold_out(items, 0.1, seed=3) == (train, held_out)
    assert hold_out(items, 0.1, seed=4) != (train, held_out)
    assert [len(part) for part in hold_out([1, 2], 0.01, 0)] == [1, 1]
    assert [len(part) for part in hold_out([1, 2], 0.99, 0)] == [1, 1]
    with pytest.raises(DataError, match="too few"):
        hold_out([1], 0.5, 0)


def test_a_held_out_file_leaves_the_training_rows_whole(tmp_path: Path) -> None:
    train = written(tmp_path, "a.jsonl", "".join(f'{{"x": {place}}}\n' for place in range(20)))
    other = written(tmp_path, "b.jsonl", '{"x": 99}\n')
    named = read_splits(data(train=str(train), validation=str(other)), 0)
    assert [len(part) for part in named] == [20, 1]
    split = read_splits(data(train=str(train), validation_fraction=0.25, max_rows=3), 0)
    assert [len(part) for part in split] == [3, 3]
    assert not {row["x"] for row in split[0]} & {row["x"] for row in split[1]}
    assert read_splits(data(train=str(train), validation_fraction=0), 0)[1] == []


def test_a_dataset_of_the_hub_gives_class_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local folder goes through the same loader as the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    folder = tmp_path / "set"
    folder.mkdir()
    content = {"text": ["a", "b", "c"], "label": [1, 0, 1]}
    datasets.Dataset.from_dict(content, features=features).to_parquet(folder / "train.parquet")
    rows = read_hub(str(folder), "train")
    assert [row.values for row in rows] == [
        {"text": "a", "label": "yes"},
        {"text": "b", "label": "no"},
        {"text": "c", "label": "yes"},
    ]
    with pytest.raises(DataError, match="cannot load the split 'test'"):
        read_hub(str(folder), "test")
    with pytest.raises(DataError, match=r"A local file goes under data.train"):
        read_hub("no-such-owner/no-such-set", "train")


# GLUE: the task, a file as it is distributed, and the columns and label of the first row.
GLUE_FILES = [
    (
        "mrpc",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
        '1\t7\t8\tHe said " so .\tSo " he .\r\n',
        ('He said " so .', 'So " he .', "1"),
    ),
    ("cola", "gj04\t1\t\tFirst one.\ngj04\t0\t*\tSecond one.\n", ("First one.", "1")),
    (
        "rte",
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n",
        ("a", "b", "not_entailment"),
    ),
    ("sst2", "sentence\tlabel\nfine \t1\n", ("fine ", "1")),
    ("qnli", "index\tquestion\tsentence\tlabel\n0\ta?\tb\tentailment\n", ("a?", "b", "entailment")),
    (
        "stsb",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tm\tf\t2012\t1\tnone\tnone\ta\tb\t3.800\n",
        ("a", "b", "3.800"),
    ),
]


@pytest.mark.parametrize(("task", "content", "first"), GLUE_FILES)
def test_glue_files_are_read_as_they_are_distributed(
    tmp_path: Path, task: str, content: str, first: tuple[str, ...]
) -> None:
    written(tmp_path, "train.tsv", content)
    row = read_glue(task, tmp_path, "train")[0]
    columns = (*GLUE[task].text_columns, GLUE[task].label_column)
    assert tuple(row[column] for column in columns) == first


def test_cola_s_test_file_has_a_header_and_its_others_have_none(tmp_path: Path) -> None:
    test = written(tmp_path, "test.tsv", "index\tsentence\n0\tOne.\n")
    assert [row["sentence"] for row in read_glue_file("cola", test)] == ["One."]
    dev = written(tmp_path, "dev.tsv", "gj04\t1\t\tOne.\n")
    assert [row["sentence"] for row in read_glue_file("cola", dev)] == ["One."]
    with pytest.raises(DataError, match="line 2: 3 fields; a line of CoLA has 4"):
        read_glue_file("cola", written(tmp_path, "bad.tsv", "a\t1\t\tOne.\nb\t1\tTwo.\n"))


def test_the_folder_of_another_task_is_noticed(tmp_path: Path) -> None:
    written(tmp_path, "train.tsv", "sentence\tlabel\nfine\t1\n")
    with pytest.raises(DataError, match=r"Is data.path the folder of mrpc"):
        read_glue("mrpc", tmp_path, "train")
    with pytest.raises(DataError, match=r"dev\.tsv does not exist"):
        read_glue("sst2", tmp_path, "dev")
    with pytest.raises(DataError, match="is not a folder"):
        read_glue("sst2", tmp_path / "nowhere", "train")


@pytest.mark.parametrize(
    ("task", "folder", "train", "dev"),
    [
        ("mrpc", "MRPC", 3667, 408),  # of 3,668: one line of this copy is lost
        ("cola", "CoLA", 8551, 1043),
        ("rte", "RTE", 2490, 277),
        ("stsb", "STS-B", 5749, 1500),
    ],
)
def test_the_official_files_are_read_whole(
    shared: Path, task: str, folder: str, train: int, dev: int
) -> None:
    found = [len(read_glue(task, shared / "data/glue" / folder, its)) for its in ("train", "dev")]
    assert found == [train, dev]


def test_a_file_to_be_judged_by_is_looked_for_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the data file .*nosuch\.tsv does not exist"):
        evaluate_run(tmp_path / "no-run", str(tmp_path / "nosuch.tsv"))
