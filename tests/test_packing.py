"""Packing: rows of one sequence do not see each other, and each keeps its loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from msplora.errors import ConfigError
from msplora.train.held_out_loss import held_out_loss
from msplora.train.lengths import Limit
from msplora.train.packing import packed_length, refuse_leaking
from msplora.train.settings_file import read_settings
from msplora.train.sft import prepare
from msplora.train.tokenise_sft import IGNORED, Tokens
from runs import answered_rows, msplora, save_decoder, write_config, write_jsonl
from tiny import llama


def row(start: int, length: int, learnt: int) -> Tokens:
    ids = [5 + (start + 7 * place) % 50 for place in range(length)]
    return Tokens("x", ids, [IGNORED] * (length - learnt) + ids[length - learnt :])


ROWS = [row(0, 20, 5), row(3, 12, 4)]


def config(folder: Path, **training: Any) -> Path:
    write_jsonl(folder / "rows.jsonl", answered_rows(30))
    content = {
        "model": str(save_decoder(folder / "base")),
        "task": "sft",
        "output": str(folder / "run"),
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 40},
        "training": {"batch_size": 3, "epochs": 1, "packing": True, "logging_steps": 1} | training,
    }
    return write_config(folder / "run.yaml", content)


def test_the_loss_of_packed_rows_is_that_of_the_rows_alone(tmp_path: Path) -> None:
    """The sum over all packed batches, against every row in a batch of its own."""
    job = prepare(read_settings(config(tmp_path)))
    trainer = job.make_trainer(tmp_path / "checkpoints")
    packed = trainer.train_dataset
    assert max(map(len, packed["input_ids"])) <= 40
    assert len(packed) < 27 / 2
    rows = [
        Tokens("x", ids[start : start + length], labels[start : start + length])
        for ids, labels, lengths in zip(
            packed["input_ids"], packed["labels"], packed["seq_lengths"], strict=True
        )
        for start, length in zip(
            [sum(lengths[:place]) for place in range(len(lengths))], lengths, strict=True
        )
    ]
    assert len(rows) == 27  # none lost, none cut
    assert all(IGNORED in its.labels and its.labels[-1] == 2 for its in rows)  # masked, and ended
    alone = held_out_loss(trainer.model, rows, 0, batch_size=1)
    trainer.model.eval()
    loss, count = 0.0, 0
    for batch in trainer.get_train_dataloader():
        learnt = int((batch["labels"][:, 1:] != IGNORED).sum())
        with torch.no_grad():
            loss += trainer.compute_loss(trainer.model, dict(batch)).item() * learnt
        count += learnt
    assert count == alone["tokens"]
    assert loss / count == pytest.approx(alone["loss"], rel=1e-5)


def test_held_out_rows_are_judged_one_by_one(tmp_path: Path) -> None:
    losses = []
    for packing in (True, False):
        file = config(tmp_path, packing=packing)
        result = msplora("train", file, "--force", "--set", "training.max_steps=1")
        assert result.code == 0, result.err
        losses.append(json.loads((tmp_path / "run/metrics.json").read_text())["before"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_that_keep_packed_rows_apart_are_taken(attention: str) -> None:
    torch.manual_seed(0)
    model: Any = llama(2, attn_implementation=attention)
    model.train()
    refuse_leaking(model, ROWS)
    refuse_leaking(model, ROWS[:1])
    assert model.training


def test_a_model_in_which_packed_rows_see_each_other_is_refused() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hf.FalconForCausalLM(hf.FalconConfig(**sizes))
    with pytest.raises(ConfigError, match="a packed row sees the rows before it"):
        refuse_leaking(model, ROWS)


def test_a_batch_that_costs_its_square_is_warned_of(tmp_path: Path) -> None:
    def warnings(**training: Any) -> list[str]:
        check = prepare(read_settings(config(tmp_path, **training))).check
        assert check
        return [its for its in check.warnings if "training.packing" in its]

    (said,) = warnings(gradient_accumulation=2)
    assert "the 3 sequences of a batch, and with sdpa attention" in said
    assert "training.batch_size: 1 and training.gradient_accumulation: 6 for" in said
    assert warnings(batch_size=1) == []


def test_a_packed_sequence_has_room_for_the_longest_row() -> None:
    assert packed_length(Limit(64, 16, "truncate"), ROWS) == 16
    assert packed_length(Limit(64, None, "truncate"), ROWS) == 64
    assert packed_length(Limit(None, None, "truncate"), ROWS) == 1024
    assert packed_length(Limit(131072, None, "truncate"), ROWS) == 1024
    assert packed_length(Limit(None, None, "truncate"), [row(0, 3000, 1)]) == 3000


def test_packing_and_grouping_by_length_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leaves no rows to group"):
        read_settings(config(tmp_path, group_by_length=True))
