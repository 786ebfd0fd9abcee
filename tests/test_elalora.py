"""ElaLoRA: against reference vectors, and its ranks, which move with all that belongs to them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerState, TrainingArguments

from adapted_llama import BATCH, LLAMA, logits
from msplora.errors import ConfigError, MSPLoraError, TargetError, UnsupportedError
from msplora.sisters import ElaLoraConfig, MoveRanks, RankMover
from msplora.sisters.elalora.ranks import (
    Moves,
    Phases,
    choose_moves,
    new_direction,
    orthogonality,
)
from runs import same

TARGETS = ["q_proj", "v_proj", "down_proj"]
MOVING = {"warmup_steps": 2, "final_steps": 2, "interval": 2, "prune_per_step": 3}


def model(**changes: Any) -> Any:
    torch.manual_seed(3)
    options = {"r": 3, "target_modules": TARGETS} | MOVING | changes
    return get_peft_model(LLAMA.model(), ElaLoraConfig(**options))


class TwoLayers(nn.Module):
    """The least that ranks can move in; `unused` has no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))).square().sum()


X = torch.linspace(-1, 1, 32).reshape(4, 8)


def small(*targets: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    options = MOVING | {"r": 3, "target_modules": list(targets or ("first", "second"))} | changes
    return get_peft_model(TwoLayers(), ElaLoraConfig(**options))


def adamw(adapted: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([its for its in adapted.parameters() if its.requires_grad], lr=0.01)


def ranks(adapted: nn.Module) -> list[int]:
    return [
        its.r["default"]
        for its in adapted.modules()
        if hasattr(its, "elalora_E")  # pyright: ignore
    ]


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=1e-10, atol=1e-14)


def train(
    adapted: Any, steps: int = 12, optimizer: Any = None, batch: Any = None
) -> tuple[Any, list[Moves]]:
    optimizer = optimizer or adamw(adapted)
    mover = RankMover(adapted, optimizer, steps)
    moved = []
    for step in range(1, steps + 1):
        if batch:
            adapted(**batch).backward()
        else:
            adapted(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        mover.before_step()
        optimizer.step()
        moves = mover.after_step(step)
        moved += [moves] if moves else []
        optimizer.zero_grad()
    return mover, moved


def test_reference_vectors(shared: Path) -> None:
    arrays = {
        name: tensor.double()
        for name, tensor in load_file(shared / "golden" / "elalora_linear.safetensors").items()
    }
    config = ElaLoraConfig(r=4, lora_alpha=16, target_modules=["0"], orthogonal_penalty=0.0)
    adapted: Any = get_peft_model(nn.Sequential(nn.Linear(10, 12)).double(), config)
    site = adapted.base_model.model[0]
    with torch.no_grad():
        site.base_layer.weight.copy_(arrays["W0"])
        site.base_layer.bias.copy_(arrays["b0"])
        for name, parameter in site.factors("default").items():
            parameter.copy_(arrays[name[-1]])
    y = adapted(arrays["x"])
    assert close(y, arrays["out.y"])
    (arrays["cot"] * y).sum().backward()
    for name, parameter in site.factors("default").items():
        assert close(parameter.grad, arrays[f"grad.{name[-1]}"]), name
    assert close(site.get_delta_weight("default"), arrays["out.delta"])
    # A rate of zero: the importance is that of the weights the gradient was taken at.
    mover = RankMover(adapted, torch.optim.SGD(adapted.parameters(), lr=0.0), steps=100)
    mover.after_step(1)
    assert close(mover.scores()[0], arrays["score"])
    merged = adapted.merge_and_unload()
    assert close(merged(arrays["x"]), arrays["out.y"])


def test_ranks_move_and_their_sum_stays() -> None:
    adapted = model()
    _, moved = train(adapted)
    assert sum(ranks(adapted)) == 3 * len(ranks(adapted))
    assert len(set(ranks(adapted))) > 1
    assert min(ranks(adapted)) >= 1
    assert [its.count for its in moved] == [3, 3, 2]  # after steps 4, 6, 8; b falls
    for layer in adapted.modules():
        if hasattr(layer, "elalora_E"):
            for name, parameter in layer.factors("default").items():
                assert layer.r["default"] == parameter.shape[name == "elalora_B"], name


def test_ranks_move_in_any_loop() -> None:
    # One holds its losses, and with them the graphs, which remember the shapes that there were.
    found = []
    for holds in (False, True):
        adapted = small()
        optimizer, held = adamw(adapted), []
        mover = RankMover(adapted, optimizer, 12)
        for step in range(1, 13):
            loss = adapted(X)
            loss.backward()
            mover.before_step()
            optimizer.step()
            mover.after_step(step)
            optimizer.zero_grad()
            held += [loss] if holds else []
            del loss
        found.append(adapted.state_dict())
        assert len(set(ranks(adapted))) > 1
    assert same(*found)


@pytest.mark.parametrize("skipped", [1, 4])
def test_a_step_that_a_scaler_skips_counts_for_nothing(skipped: int) -> None:
    adapted = small()
    optimizer, scaler = adamw(adapted), torch.amp.GradScaler("cpu")
    mover = RankMover(adapted, optimizer, 12)
    for step in range(1, 13):
        scaler.scale(adapted(X) * (1e38 if step == skipped else 1)).backward()
        scaler.unscale_(optimizer)
        mover.before_step()
        scaler.step(optimizer)
        scaler.update()
        moves = mover.after_step(step)
        assert (moves is not None) == (step in (4, 6, 8) and step != skipped)
        optimizer.zero_grad()
    assert all(its.isfinite().all() for its in mover.scores())
    assert len(set(ranks(adapted))) > 1


def test_a_step_that_accelerate_skipped_counts_for_nothing() -> None:
    adapted = small()
    optimizer: Any = adamw(adapted)
    callback = MoveRanks()
    callback.mover = RankMover(adapted, optimizer, 12)
    adapted(X).backward()
    optimizer.step_was_skipped = True
    callback.on_optimizer_step(None, TrainerState(), None)
    assert not optimizer.state
    optimizer.step_was_skipped = False
    callback.on_optimizer_step(None, TrainerState(), None)
    assert optimizer.state


def test_a_layer_that_no_loss_depends_on_is_worth_nothing() -> None:
    adapted = small("first", "second", "unused", orthogonal_penalty=0.0)
    mover, moved = train(adapted, batch={"x": X})
    assert mover.scores()[-1].tolist() == [0.0] * ranks(adapted)[-1]
    assert moved[0].pruned[2]


def test_a_rank_pattern_means_what_it_means_in_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"first": nn.Linear(8, 8), "a": nn.ModuleDict({"first": nn.Linear(8, 8)})})
    found = []
    for config in (peft.LoraConfig, ElaLoraConfig):
        options: Any = {"r": 3, "target_modules": ["first"], "rank_pattern": {"first": 1}}
        adapted: Any = get_peft_model(copy.deepcopy(base), config(**options))
        model = adapted.base_model.model
        found.append([model["first"].r["default"], model["a"]["first"].r["default"]])
    assert found == [[1, 1], [1, 1]]
    # What moves write is meant for one layer, though its key could be the pattern of others.
    site = model["first"]
    site.replace("default", moved_to(site, 3))
    adapted.save_pretrained(tmp_path)
    again: Any = peft.PeftModel.from_pretrained(base, tmp_path)
    assert ranks(again) == ranks(adapted) == [3, 1]
    with pytest.raises(TargetError, match=r"none of the adapted modules.*Did you mean 'first'"):
        small(rank_pattern={"frist": 2})


def moved_to(site: Any, rank: int) -> dict[str, Tensor]:
    return {
        "elalora_A": torch.zeros(rank, site.in_features),
        "elalora_E": torch.zeros(rank, 1),
        "elalora_B": torch.zeros(site.out_features, rank),
    }


def test_pefts_scaling_holds_after_moves() -> None:
    adapted = small()
    mover, _ = train(adapted, batch={"x": X})
    assert len(set(ranks(adapted))) > 1
    for layer in mover.layers.values():
        scale = layer.scaling["default"]
        layer.set_scale("default", 2.0)
        assert layer.scaling["default"] == pytest.approx(2 * scale)
        layer.unscale_layer()
        assert layer.scaling["default"] == pytest.approx(scale)


def test_growing_changes_nothing_yet_and_points_elsewhere() -> None:
    adapted = model()
    mover, _ = train(adapted, steps=8)
    layer = next(iter(mover.layers.values()))
    before = {name: its.detach().clone() for name, its in layer.factors("default").items()}
    expected = logits(adapted.eval())
    mover.move(layer, [], 2, torch.Generator().manual_seed(0))
    assert torch.allclose(logits(adapted), expected, atol=1e-6)
    after = layer.factors("default")
    rank = len(before["elalora_E"])
    for new, old in (
        (after["elalora_A"], before["elalora_A"]),
        (after["elalora_B"].T, before["elalora_B"].T),
    ):
        assert torch.equal(new[:rank], old)
        assert (new[:rank] @ new[rank:].T).abs().max() < 1e-6
        assert torch.allclose(new[rank:] @ new[rank:].T, torch.eye(2), atol=1e-6)
    assert not after["elalora_E"][rank:].any()


def test_the_optimisers_state_follows_the_ranks() -> None:
    adapted = model()
    mover, _ = train(adapted, steps=8)
    layer = next(iter(mover.layers.values()))
    rank = layer.r["default"]
    old = {
        name: {key: its.clone() for key, its in mover.optimizer.state[parameter].items()}
        for name, parameter in layer.factors("default").items()
    }
    stay = [its for its in range(rank) if its != 1]
    mover.move(layer, [1], 1, torch.Generator().manual_seed(0))
    for name, parameter in layer.factors("default").items():
        state = mover.optimizer.state[parameter]
        assert {"exp_avg", "exp_avg_sq", "elalora_importance", "elalora_uncertainty"} < set(state)
        for key, value in state.items():
            if key == "step":
                assert value == old[name][key]
                continue
            new, was = (its.T if name == "elalora_B" else its for its in (value, old[name][key]))
            assert torch.equal(new[:-1], was[stay]), (name, key)
            assert was.any()
            assert not new[-1].any(), (name, key)
    adapted(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    mover.optimizer.step()  # of the shapes that there are now


def test_what_was_moved_is_saved_and_loaded(tmp_path: Path) -> None:
    adapted = model()
    train(adapted)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(LLAMA.model(), tmp_path)
    assert ranks(again) == ranks(adapted)
    assert torch.equal(logits(again.eval()), logits(adapted.eval()))
    # Into an adapter whose ranks are others, as a trainer goes back to its best checkpoint.
    other = model()
    other.load_adapter(str(tmp_path), "default")
    assert ranks(other) == ranks(adapted)
    assert torch.equal(logits(other.eval()), logits(adapted))
    assert other.peft_config["default"].rank_pattern == adapted.peft_config["default"].rank_pattern


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 12, "per_device_train_batch_size": 2,
        "learning_rate": 0.01, "save_steps": 5, "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**(options | changes))


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 60, (24, 8), generator=generator)
    return [{"input_ids": its, "labels": its} for its in ids]


@pytest.mark.slow
def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    def trainer(folder: Path, **changes: Any) -> Trainer:
        return Trainer(
            model(lora_dropout=0.1),
            args=arguments(folder, **changes),
            train_dataset=rows(),  # pyright: ignore[reportArgumentType]
            callbacks=[MoveRanks()],
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-5"  # after the first move, before two more
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert ranks(resumed.model) == ranks(whole.model)  # pyright: ignore[reportArgumentType]
    assert same(whole.model.state_dict(), resumed.model.state_dict())  # pyright: ignore
    at_five = load_file(checkpoint / "adapter_model.safetensors")
    at_end = peft.get_peft_model_state_dict(whole.model)  # pyright: ignore[reportArgumentType]
    moved = [name for name, its in at_five.items() if its.shape != at_end[name].shape]
    assert moved  # else the test would not have crossed a move


def test_what_moves() -> None:
    scores = [[5.0, 1.0, 9.0], [2.0, 8.0, 7.0], [3.0, 4.0, 6.0]]
    # Pool: 1 and 5 of the first site, 2 and 7 of the second, 3 and 4 of the third.
    assert choose_moves(scores, [9] * 3, 2, 2) == Moves({0: [1], 1: [0]}, {1: 1, 0: 1})
    # Never more than half the pool, and never a site's last rank.
    assert choose_moves(scores, [9] * 3, 2, 50).count == 3
    assert choose_moves([[1.0], [2.0]], [9] * 2, 2, 2) == Moves()
    # A site that is full gains nothing, and then no more is pruned than is gained.
    assert choose_moves(scores, [9, 0, 0], 2, 3) == Moves({0: [1]}, {0: 1})


def test_phases() -> None:
    phases = Phases.of(ElaLoraConfig(warmup_steps=10, final_steps=20, interval=5), 100)
    assert [step for step in range(1, 101) if phases.due(step)] == list(range(15, 80, 5))
    assert phases.count(10, 4) == 4
    assert phases.count(80, 4) == 0
    assert phases.count(45, 4) == round(4 * (1 - 0.5**3))
    assert Phases.of(ElaLoraConfig(), 1000) == Phases(200, 40, 750)
    with pytest.raises(ConfigError, match="never move: of 30 steps"):
        Phases.of(ElaLoraConfig(warmup_steps=10, final_steps=20), 30)


def test_orthogonal() -> None:
    square = torch.linalg.qr(torch.randn(6, 6)).Q
    assert orthogonality([square[:3], square[:4]]) < 1e-5
    assert torch.isclose(orthogonality([2 * square[:3], square]), torch.tensor(27**0.5 / 2))
    assert orthogonality([square.to("meta"), square]).is_meta  # of layers on several devices
    direction = new_direction(square[:5] * 7, torch.Generator().manual_seed(0))
    assert torch.isclose((direction @ square[5]).abs(), torch.tensor(1.0), atol=1e-5)


def test_the_penalty_pulls_towards_orthogonal_factors() -> None:
    found = []
    for penalty in (0.0, 1.0):
        adapted = model(orthogonal_penalty=penalty)
        train(adapted)
        layers = [its for its in adapted.modules() if hasattr(its, "elalora_E")]
        factors = [its.factors("default")["elalora_A"] for its in layers]
        found.append(orthogonality(factors).item())
    assert found[1] < 0.9 * found[0]


def test_what_cannot_move_is_refused() -> None:
    adapted = model()
    parameters = [its for its in adapted.parameters() if its.requires_grad]
    with pytest.raises(UnsupportedError, match="cannot follow"):
        train(adapted, optimizer=torch.optim.Adafactor(parameters, lr=0.01))
    with pytest.raises(MSPLoraError, match="no ElaLoRA adapter 'other'"):
        RankMover(adapted, None, 12, adapter_name="other")
    adapted.zero_grad()
    mover = RankMover(adapted, adamw(adapted), 12)
    with pytest.raises(MSPLoraError, match="after_step before zero_grad"):
        mover.after_step(1)
    with pytest.raises(MSPLoraError, match="does not hold base_model"):
        RankMover(adapted, torch.optim.AdamW(parameters[1:]), 12)
    adapted.requires_grad_(False)
    with pytest.raises(MSPLoraError, match="is_trainable=True"):
        RankMover(adapted, torch.optim.AdamW(parameters), 12)
    for penalty in (float("nan"), float("inf"), -0.1):
        with pytest.raises(ConfigError, match="orthogonal_penalty"):
            ElaLoraConfig(orthogonal_penalty=penalty)
    with pytest.raises(ConfigError, match="beta1 = 1"):
        ElaLoraConfig(beta1=1)
    with pytest.raises(ConfigError, match="interval = 0"):
        ElaLoraConfig(interval=0)
