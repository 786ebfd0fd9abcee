"""The trainers of transformers and TRL train, save and resume an adapter."""

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
)
from oracle import (
    assert_shared,
    plan_of,
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
def test_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl (the train extra) is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets (the train extra) is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>"] + [f"w{place}" for place in range(VOCABULARY - 3)]
    inner = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    data = datasets.Dataset.from_list([{"text": f"w{n} w{n + 1} w{n + 2}"} for n in range(12)])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.SFTTrainer(
        model=LLAMA.model(),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=config(task_type="CAUSAL_LM"),
    )
    plan = plan_of(trainer.model)
    assert trainable(trainer.model) == plan.parameters
    trainer.train()
    assert_shared(trainer.model, plan)
    assert all(bool(b.any()) for _, b, _ in msplora.factors(trainer.model).values())
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(LLAMA.model(), tmp_path / "saved").eval()
    assert torch.equal(logits(loaded), logits(trainer.model.eval()))
