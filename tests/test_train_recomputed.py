"""Gradient checkpointing changes no number: every task trains through a frozen base with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runs import (
    answered_rows,
    labelled_rows,
    save_decoder,
    save_encoder,
    tensors,
    write_config,
    write_jsonl,
)
from runs import msplora as command
from tiny_images import paint_folder, save_vision_model

TARGETS = {"sft": "base", "dpo": "base", "classification": "encoder", "image-classification": "vit"}


@pytest.mark.parametrize(
    "task",
    ["sft", *(pytest.param(task, marks=pytest.mark.slow) for task in TARGETS if task != "sft")],
)
def test_recomputing_gives_the_same_adapter(task: str, tmp_path: Path) -> None:
    save_decoder(tmp_path / "base")
    save_encoder(tmp_path / "encoder", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    save_vision_model(tmp_path / "vit")
    paint_folder(tmp_path / "image-classification", 4)
    write_jsonl(tmp_path / "sft.jsonl", answered_rows(8))
    write_jsonl(tmp_path / "classification.jsonl", labelled_rows(8))
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " w0"}
        for row in answered_rows(8)
    ]
    write_jsonl(tmp_path / "dpo.jsonl", pairs)
    data = tmp_path / (task if task == "image-classification" else f"{task}.jsonl")
    found = []
    for again in (False, True):
        content: dict[str, Any] = {
            "model": str(tmp_path / TARGETS[task]),
            "task": task,
            "output": str(tmp_path / f"run-{again}"),
            "data": {"train": str(data), "validation_fraction": 0.25},
            "adapter": {"target_modules": "all-linear"},
            "training": {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01}
            | {"gradient_checkpointing": again},
        }
        result = command("train", write_config(tmp_path / "c.yaml", content))
        assert result.code == 0, result.err
        found.append(tensors(tmp_path / f"run-{again}/adapter"))
    straight, recomputed = found
    for key, tensor in straight.items():
        assert bool(tensor.any()), key  # B starts at zero: it has had a gradient
        assert recomputed[key].allclose(tensor, rtol=1e-4, atol=1e-6), key
