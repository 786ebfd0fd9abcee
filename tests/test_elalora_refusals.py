"""What ElaLoRA refuses: runs in which no rank can move, and optimisers that cannot follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from msplora.errors import ConfigError, UnsupportedError
from msplora.sisters import ElaLoraConfig, RankMover
from msplora.sisters.elalora.ranks import Phases
from test_elalora import X, adamw, small, train


@pytest.mark.parametrize(
    ("targets", "changes", "option"),
    [
        (["first", "second"], {"r": 1}, "Raise r,"),
        (["first"], {"r": 2}, "Raise r,"),
        (["first"], {"r": 3, "pool_per_site": 1}, "Raise pool_per_site,"),
        (["first", "second"], {"r": 8}, "16 in all and take no more than 16.*Lower r,"),
    ],
)
def test_ranks_that_can_never_move(
    targets: list[str], changes: dict[str, Any], option: str
) -> None:
    adapted = small(*targets, **changes)
    with pytest.raises(ConfigError, match=f"would never move: .*{option}"):
        RankMover(adapted, adamw(adapted), 12)


def test_a_single_free_place_is_enough_to_move() -> None:
    adapted = small(r=8, rank_pattern={"second": 7})
    mover, moved = train(adapted, batch={"x": X})
    assert sum(its.count for its in moved) > 0
    assert sum(its.room("default") for its in mover.layers.values()) == 1
    RankMover(adapted, mover.optimizer, 12)  # as a run that is resumed would


def test_what_has_moved_may_go_on() -> None:
    """With the ranks 3 and 1 no layer has a second to compare; a resumed run is not refused."""
    adapted = small(r=2, pool_per_site=1)
    mover = RankMover(adapted, adamw(adapted), 12)
    first, second = mover.layers.values()
    generator = torch.Generator().manual_seed(0)
    mover.move(first, [], 1, generator)
    mover.move(second, [0], 0, generator)
    RankMover(adapted, mover.optimizer, 12)


def test_moves_that_all_come_to_nothing() -> None:
    with pytest.raises(ConfigError, match=r"after step 740, interval = 540 .* Lower interval, or"):
        Phases.of(ElaLoraConfig(interval=540), 1000)
    assert Phases.of(ElaLoraConfig(interval=540, prune_per_step=10), 1000).count(740, 10) > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {"amsgrad": True}),
        ("Adamax", {}),
        ("NAdam", {}),
        ("SGD", {"momentum": 0.9}),
        ("RMSprop", {"centered": True, "momentum": 0.9}),
        ("Adadelta", {}),
        ("Adagrad", {}),
    ],
)
def test_optimisers_whose_state_begins_at_zero_follow(name: str, options: dict[str, Any]) -> None:
    adapted = small()
    trained = [its for its in adapted.parameters() if its.requires_grad]
    optimizer = getattr(torch.optim, name)(trained, lr=1e-3, **options)
    _, moved = train(adapted, optimizer=optimizer, batch={"x": X})
    assert all(moves.count for moves in moved)


@pytest.mark.parametrize(("name", "kept"), [("Rprop", "prev"), ("ASGD", "ax")])
def test_an_optimiser_whose_state_begins_elsewhere_is_refused(name: str, kept: str) -> None:
    adapted = small()
    trained = [its for its in adapted.parameters() if its.requires_grad]
    with pytest.raises(UnsupportedError, match=f"keeps '{kept}'.* Use AdamW"):
        train(adapted, optimizer=getattr(torch.optim, name)(trained, lr=1e-3), batch={"x": X})


def test_a_torch_without_distributed_moves_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = small()
    optimizer = adamw(adapted)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    RankMover(adapted, optimizer, 12)
