"""The loss per token of held-out rows: the same in any pieces and batches."""

from __future__ import annotations

import pytest
import torch

from msplora.train import held_out_loss as module
from msplora.train.held_out_loss import held_out_loss
from msplora.train.tokenise_sft import IGNORED, Tokens
from tiny import VOCABULARY, llama


@pytest.fixture
def rows() -> list[Tokens]:
    """Rows of 3 to 11 tokens, of which the first two are a prompt; in one row nothing counts."""
    torch.manual_seed(0)
    ids = [torch.randint(VOCABULARY, (length,)).tolist() for length in (5, 11, 3, 7, 4)]
    learnt = [[IGNORED, IGNORED, *its[2:]] for its in ids]
    learnt[-1] = [IGNORED] * 4
    return [Tokens("x", *its) for its in zip(ids, learnt, strict=True)]


@pytest.mark.parametrize("piece", [1, 3 * VOCABULARY, 2**23])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_it_is_the_mean_over_tokens_that_count(
    rows: list[Tokens], piece: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    expected, tokens = 0.0, 0
    for row in rows[:-1]:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        count = int((labels[:, 1:] != IGNORED).sum())
        expected += model(input_ids=ids, labels=labels).loss.item() * count
        tokens += count
    monkeypatch.setattr(module, "PIECE", piece)
    found = held_out_loss(model, rows, pad_token_id=0, batch_size=batch_size)
    assert found["tokens"] == tokens == 18
    assert found["loss"] == pytest.approx(expected / tokens, rel=1e-5)


def test_no_more_than_a_piece_is_in_float32(
    rows: list[Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    judge = module.F.cross_entropy

    def noted(scores: torch.Tensor, *arguments: object, **named: object) -> torch.Tensor:
        assert scores.dtype == torch.float32
        sizes.append(scores.numel())
        return judge(scores, *arguments, **named)  # pyright: ignore

    monkeypatch.setattr(module.F, "cross_entropy", noted)
    monkeypatch.setattr(module, "PIECE", 4 * VOCABULARY)
    held_out_loss(llama().bfloat16(), rows, pad_token_id=0, batch_size=5)
    assert max(sizes) <= 4 * VOCABULARY
    assert sum(sizes) == 18 * VOCABULARY
