"""The file of `msplora predict`: each row is there once it is predicted, whatever comes after."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from msplora.errors import ConfigError
from msplora.train.prediction import Prediction
from msplora.train.predictions_file import write_predictions
from msplora.train.stopping import Interrupted

ROWS: list[Prediction] = [{"row": 1, "completion": "a\tb"}, {"row": 2, "completion": "é\n"}]


def until(end: BaseException, partial: Path) -> Iterator[Prediction]:
    for number, row in enumerate(ROWS, 1):
        yield row
        assert len(partial.read_text(encoding="utf-8").splitlines()) == number
    raise end


def test_what_was_predicted_is_kept_when_something_ends_it(tmp_path: Path) -> None:
    out, partial = tmp_path / "new/out.jsonl", tmp_path / "new/out.jsonl.partial"
    with pytest.raises(Interrupted, match=r"Ctrl-C\. .*out\.jsonl\.partial: 2 row") as stopped:
        write_predictions(until(KeyboardInterrupt(), partial), out)
    assert stopped.value.exit_code == 130
    with pytest.raises(MemoryError):  # the lines of the time before are not added to
        write_predictions(until(MemoryError(), partial), out)
    assert [json.loads(line) for line in partial.read_text("utf-8").splitlines()] == ROWS
    assert not out.exists()
    assert write_predictions(ROWS, out) == 2
    assert [json.loads(line) for line in out.read_text("utf-8").splitlines()] == ROWS
    assert not partial.exists()


def test_nothing_is_left_where_nothing_was_predicted(tmp_path: Path) -> None:
    def refused() -> Iterator[Prediction]:
        raise ConfigError("no such run")
        yield

    with pytest.raises(ConfigError, match="no such run"):
        write_predictions(refused(), tmp_path / "out.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_told_from_an_error_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "out.tsv.partial").mkdir()
    with pytest.raises(ConfigError, match=r"could not be written: .*Nothing was predicted yet"):
        write_predictions(ROWS, tmp_path / "out.tsv")
    out = tmp_path / "out.jsonl"
    with pytest.raises(OSError, match="of the model"):
        write_predictions(until(OSError("of the model"), tmp_path / "out.jsonl.partial"), out)


def test_a_table_has_its_names_once_and_separators_as_escapes(tmp_path: Path) -> None:
    write_predictions(ROWS, tmp_path / "out.tsv")
    lines = (tmp_path / "out.tsv").read_text("utf-8").splitlines()
    assert lines == ["row\tcompletion", "1\ta\\tb", "2\té\\n"]
