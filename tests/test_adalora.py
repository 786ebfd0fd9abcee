"""AdaLoRA in a Trainer: what is evaluated is what is saved; skipped steps count for nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import Trainer, TrainerState, TrainingArguments

from adapted_llama import BATCH, LLAMA
from msplora.errors import ConfigError
from msplora.train.adalora import AllocateRanks, for_now, leave_penalty_out
from msplora.train.saved_adapter import load_adapter
from msplora.train.settings_methods import AdaLoraSettings
from test_trainers import rows

STEPS = 12
# Pruned after step 5, and for good after step 10: in between, what was pruned trains on.
SETTINGS = AdaLoraSettings(init_r=6, tinit=2, tfinal=2, deltaT=5)


def model() -> Any:
    torch.manual_seed(3)
    config = AdaLoraConfig(
        target_r=2,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        **for_now(2, {"init_r": 6}),
    )
    adapted = get_peft_model(LLAMA.model(), config)
    leave_penalty_out(adapted)
    return adapted


def trainer(folder: Path, adapted: Any, *callbacks: Any, **changes: Any) -> Trainer:
    """Of one epoch, in which evaluations draw no random numbers that training would draw."""
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 64,
        "learning_rate": 0.05,
        "save_steps": 1,
        "eval_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        model=adapted,
        args=TrainingArguments(**options | changes),
        train_dataset=rows(),
        eval_dataset=rows(),
        callbacks=list(callbacks),
    )


def diagonals(adapted: Any) -> dict[str, torch.Tensor]:
    return {
        name: its.detach().clone() for name, its in adapted.named_parameters() if "lora_E" in name
    }


@pytest.mark.parametrize(
    ("strategy", "batch", "evaluated"),
    [("steps", 1, list(range(1, STEPS + 1))), ("epoch", 4, [4, 8, 12])],
)
def test_every_checkpoint_scores_what_was_scored_when_it_was_saved(
    tmp_path: Path, strategy: str, batch: int, evaluated: list[int]
) -> None:
    run = trainer(
        tmp_path,
        model(),
        AllocateRanks(SETTINGS),
        per_device_train_batch_size=batch,
        eval_strategy=strategy,
        save_strategy=strategy,
    )
    run.train()
    scored = {its["step"]: its["eval_loss"] for its in run.state.log_history if "eval_loss" in its}
    assert list(scored) == evaluated
    for step, loss in scored.items():
        saved = load_adapter(LLAMA.model(), tmp_path / f"checkpoint-{step}")
        found = trainer(tmp_path / "again", saved).evaluate()["eval_loss"]
        assert found == pytest.approx(loss, rel=1e-5), step


def test_evaluations_change_nothing_of_the_training(tmp_path: Path) -> None:
    found = []
    for strategy in ("no", "steps"):
        adapted = model()
        seen: list[dict[str, torch.Tensor]] = []
        run = trainer(tmp_path / strategy, adapted, AllocateRanks(SETTINGS), eval_strategy=strategy)
        step = run.training_step

        def watched(its: Any, *rest: Any, step: Any = step, seen: Any = seen) -> torch.Tensor:
            seen.append(diagonals(its))
            return step(its, *rest)

        run.training_step = watched
        run.train()
        found.append([*seen, diagonals(adapted)])
    for without, evaluated in zip(*found, strict=True):
        assert without.keys() == evaluated.keys()
        assert all(torch.equal(its, evaluated[name]) for name, its in without.items())
    # What was pruned after step 5 is there again at the start of step 7.
    assert all(its.count_nonzero() == its.numel() for its in found[1][6].values())


@pytest.mark.parametrize("skipped", [1, 5, 10])
def test_a_step_that_a_scaler_skips_counts_for_nothing(skipped: int) -> None:
    adapted = model()
    parameters = [its for its in adapted.parameters() if its.requires_grad]
    optimizer, scaler = torch.optim.AdamW(parameters, lr=0.05), torch.amp.GradScaler("cpu")
    callback = AllocateRanks(SETTINGS)
    args = SimpleNamespace(fp16=True, max_grad_norm=1.0)
    callback.on_train_begin(args, TrainerState(max_steps=STEPS), None, model=adapted)
    for step in range(1, STEPS + 1):
        loss = adapted(**BATCH, labels=BATCH["input_ids"]).loss
        scaler.scale(loss * (1e38 if step == skipped else 1)).backward()
        scaler.unscale_(optimizer)
        callback.on_pre_optimizer_step(args, None, None, model=adapted)
        scaler.step(optimizer)
        scaler.update()
        state = TrainerState(global_step=step - 1)
        callback.on_optimizer_step(args, state, None, model=adapted, optimizer=optimizer)
        for averages in (
            adapted.base_model.rankallocator.exp_avg_ipt,
            adapted.base_model.rankallocator.exp_avg_unc,
        ):
            assert all(its.isfinite().all() for its in averages.values())
        optimizer.zero_grad()
    pattern = adapted.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 2 * len(pattern)
    for name, its in diagonals(adapted).items():
        kept = pattern[name.removeprefix("base_model.model.")]
        assert [bool(value) for value in its] == kept


def test_float16_without_clipping_is_refused() -> None:
    args = SimpleNamespace(fp16=True, max_grad_norm=0.0)
    with pytest.raises(ConfigError, match=r"AdaLoRA adds to them what is not\. Set max_grad"):
        AllocateRanks(SETTINGS).on_train_begin(args, TrainerState(max_steps=STEPS), None)
