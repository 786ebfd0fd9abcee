"""Rows of like length in one batch, in an order that a resumed run finds again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from msplora.train.dpo import HeldOutDPOTrainer
from msplora.train.length_groups import ResumableLengthSampler
from msplora.train.progress import ShowProgress
from runs import (
    WORDS,
    labelled_rows,
    msplora,
    same,
    save_decoder,
    save_encoder,
    tensors,
    write_config,
    write_jsonl,
)

LENGTHS = [3 + place * 13 % 60 for place in range(240)]


def spread(order: list[int], batch: int = 4) -> float:
    """How far the longest and the shortest row of a batch are apart, on average."""
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    gaps = [max(LENGTHS[its] for its in b) - min(LENGTHS[its] for its in b) for b in batches]
    return sum(gaps) / len(gaps)


def test_batches_are_of_like_length_and_hold_every_row_once() -> None:
    sampler = ResumableLengthSampler(4, LENGTHS, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(240))
    assert spread(order) < spread(list(range(240))) / 5


def test_the_order_depends_on_the_seed_and_the_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = ResumableLengthSampler(4, LENGTHS, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_a_pair_is_as_long_as_its_prompt_and_longer_answer() -> None:
    rows = {"prompt_ids": [[1], [1, 2]], "chosen_ids": [[1], [1, 2]], "rejected_ids": [[1, 2], [1]]}
    assert HeldOutDPOTrainer.row_lengths(Any, rows) == [3, 4]  # pyright: ignore


@pytest.mark.parametrize(
    "task",
    [
        pytest.param("classification", marks=pytest.mark.slow),
        pytest.param("sft", marks=pytest.mark.slow),
        pytest.param("dpo", marks=pytest.mark.thorough),
    ],
)
def test_a_run_by_length_resumes_within_an_epoch_bit_for_bit(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    classifies = task == "classification"
    base = save_encoder(tmp_path / "base") if classifies else save_decoder(tmp_path / "base")
    rows = labelled_rows(44)
    if not classifies:
        # The answer's length says which row it is of; all are told apart by it.
        rows = [{"prompt": "w1", "completion": " ".join(WORDS[: 1 + n])} for n in range(44)]
    if task == "dpo":
        rows = [{"prompt": "w1", "chosen": its["completion"], "rejected": "w2"} for its in rows]
    content: dict[str, Any] = {
        "model": str(base),
        "task": task,
        "output": "run",
        "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows))},
        "adapter": {} if task == "dpo" else {"lora_dropout": 0.1},
        "training": {
            "epochs": 2,
            "batch_size": 4,
            "learning_rate": 0.01,
            "eval_steps": 3,
            "logging_steps": 1,
            "group_by_length": True,
        },
    }
    file = write_config(tmp_path / "run.yaml", content)
    for flags in (
        ["--output", "straight"],
        ["--output", "mixed", "--set", "training.group_by_length=false"],
    ):
        assert msplora("train", file, *flags).code == 0
    usual = ShowProgress.on_step_end
    pressed: list[int] = []

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        usual(self, args, state, control, **more)
        if state.global_step == 17 and not pressed:  # of ten in an epoch
            pressed.append(17)
            raise KeyboardInterrupt

    monkeypatch.setattr(ShowProgress, "on_step_end", on_step_end)
    assert msplora("train", file).code == 130
    assert msplora("train", file, "--resume").code == 0
    found = {name: tensors(Path(name) / "adapter") for name in ("straight", "run", "mixed")}
    assert same(found["straight"], found["run"])
    assert not same(found["straight"], found["mixed"])
    histories = [
        [
            it["loss"]
            for it in json.loads(Path(name, "log_history.json").read_text())
            if "loss" in it
        ]
        for name in ("straight", "run")
    ]
    assert histories[0] == histories[1]
