"""transformers' Trainer trains, saves and resumes an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import msplora
from adapted_llama import (
    LLAMA,
    adapted,
    base_logits,
    close,
    config,
    logits,
    take_the_installed_peft,
)
from oracle import (
    same_tensors,
    tensors_of,
    trainable,
)
from tiny import VOCABULARY


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, VOCABULARY, (16, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.slow
def test_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def trainer(model: Any, steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            save_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        return Trainer(model=model, args=arguments, train_dataset=rows())

    torch.manual_seed(0)
    straight = adapted(random=False)
    trainer(straight, 6).train()
    assert not close(logits(straight.eval()), base_logits(), 1e-3)
    torch.manual_seed(1)
    resumed = adapted(random=False)
    trainer(resumed, 6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_tensors(tensors_of(resumed), tensors_of(straight))
    loaded = PeftModel.from_pretrained(LLAMA.model(), tmp_path / "checkpoint-6").eval()
    assert torch.equal(logits(loaded), logits(straight.eval()))


@pytest.mark.slow
def test_trainer_takes_a_model_that_transformers_added_the_adapter_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer, TrainingArguments

    take_the_installed_peft(monkeypatch)
    model: Any = LLAMA.model()
    model.add_adapter(config())
    before = {name: its.detach().clone() for name, its in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        save_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows()).train()
    plan = msplora.plan(model, config())
    assert trainable(model) == plan.parameters
    assert all(bool(b.any()) for _, b, _ in msplora.factors(model).values())
    for name, its in model.named_parameters():
        assert torch.equal(its, before[name]) != its.requires_grad
    loaded: Any = LLAMA.model()
    loaded.load_adapter(str(tmp_path / "checkpoint-3"))
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))
