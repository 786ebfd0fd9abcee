"""`msplora eval --harness`: lm-evaluation-harness judges the live model on local task files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import answered_rows, save_bases, write_config, write_jsonl
from runs import config_on as config
from runs import msplora as command

CHOICES = ["w1 w2 w3", "w4 w5", "w6"]
TASK = """\
task: words
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a language model and one of a classifier, and a task of twelve questions."""
    folder = save_bases(tmp_path_factory.mktemp("harness"))
    for task in ("sft", "classification"):
        content = config(folder, task, output=str(folder / task), training={"max_steps": 12})
        assert command("train", write_config(folder / f"{task}.yaml", content)).code == 0
    questions = [
        {"prompt": row["prompt"], "choices": CHOICES, "answer": place % 3}
        for place, row in enumerate(answered_rows(12))
    ]
    write_jsonl(folder / "questions.jsonl", questions)
    (folder / "tasks").mkdir()
    (folder / "tasks/words.yaml").write_text(TASK.format(file=folder / "questions.jsonl"))
    return folder


def right(folder: Path) -> float:
    """The share of questions whose answer is the likeliest, word by word and without a batch."""
    from msplora.train.saved_run import open_run

    run = open_run(folder / "sft")
    questions = [json.loads(line) for line in (folder / "questions.jsonl").open()]

    def log_odds(prompt: str, answer: str) -> float:
        words = run.base.tokenizer.convert_tokens_to_ids(["<s>", *prompt.split(), *answer.split()])
        with torch.no_grad():
            odds = run.model(input_ids=torch.tensor([words])).logits[0].log_softmax(-1)
        count = len(answer.split())
        places = range(len(words) - count, len(words))
        return sum(odds[place - 1, words[place]].item() for place in places)

    hits = 0
    for its in questions:
        odds = [log_odds(its["prompt"], choice) for choice in CHOICES]
        hits += odds.index(max(odds)) == its["answer"]
    return hits / len(questions)


def judged(folder: Path, *more: object) -> Any:
    return command("eval", folder / "sft", "--harness", "words", "--include-path", *more)


def test_the_accuracy_is_that_of_the_live_model(folder: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness (extra harness) is not installed")
    result = judged(folder, folder / "tasks", "--json")
    assert result.code == 0, result.err
    found = result.json()
    assert found["run"] == str(folder / "sft")
    assert found["tasks"]["words"]["acc"] == pytest.approx(right(folder))
    shown = judged(folder, folder / "tasks", "--batch-size", 5)
    assert f"{found['tasks']['words']['acc']:.4f}" in shown.out


@pytest.mark.parametrize(
    ("run", "task", "tasks", "said"),
    [
        ("sft", "word", "tasks", "Did you mean 'words'"),
        ("sft", "words", "nowhere", "there is no folder nowhere"),
        ("classification", "words", "tasks", "Leave --harness out"),
    ],
)
def test_it_says_what_it_cannot_judge(
    run: str, task: str, tasks: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness (extra harness) is not installed")
    monkeypatch.chdir(folder)
    result = command("eval", run, "--harness", task, "--include-path", tasks)
    assert result.code == 1
    assert said in result.error


def test_options_that_contradict_each_other(folder: Path) -> None:
    assert command("eval", folder / "sft", "--harness", "words", "--data", "x").code == 2
    assert command("eval", folder / "sft", "--include-path", "tasks").code == 2


def test_without_the_library_it_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "msplora.train.harness", raising=False)
    result = judged(folder, folder / "tasks")
    assert result.code == 1
    assert "pip install -e '.[harness]' in msplora's clone" in result.error
