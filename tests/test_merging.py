"""Merging into weights that are in several places, and what may be called rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

import msplora
from msplora import merging
from msplora.errors import UnsupportedError
from msplora.verifying import VerificationError
from tiny import MODELS

SHARED = r"cannot be merged: its weight is also that of another layer"
MERGED = "merging keeps the output"
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


def save(folder: Path, name: str, dtype: torch.dtype, **changes: Any) -> tuple[str, Path]:
    """A base, and a LoRA whose every update is for a weight that several layers have."""
    MODELS[name].model(2, dtype).save_pretrained(folder / "base")
    kind = hf.AutoModelForSeq2SeqLM if name == "t5" else hf.AutoModelForCausalLM
    model: Any = kind.from_pretrained(folder / "base", torch_dtype=dtype)
    config = LoraConfig(r=4, init_lora_weights=False, **changes)
    get_peft_model(model, config).save_pretrained(str(folder / "adapter"))
    return str(folder / "base"), folder / "adapter"


def embeddings(folder: Path, dtype: torch.dtype) -> tuple[str, Path]:
    changes = {"target_modules": ["embed_tokens"], "task_type": "SEQ_2_SEQ_LM"}
    return save(folder, "t5", dtype, **changes)


def replicated(folder: Path, dtype: torch.dtype) -> tuple[str, Path]:
    changes = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    return save(folder, "llama", dtype, layer_replication=[[0, 2], [0, 2]], **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [embeddings, replicated])
def test_a_weight_of_several_layers_is_not_merged(
    make: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    base, adapter = make(tmp_path, dtype)
    with pytest.raises(UnsupportedError, match=SHARED):
        msplora.to_merged(adapter, tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()
    check = msplora.doctor(base, adapter)[MERGED]
    assert check.status == "skipped"
    assert "Use the adapter unmerged" in check.said


def test_a_wrong_merge_is_not_excused_as_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sum is right, and what is stored at the end is not."""
    monkeypatch.setattr(merging, "_check_apart", lambda *_: None)
    base, adapter = embeddings(tmp_path, torch.bfloat16)
    check = msplora.doctor(base, adapter)[MERGED]
    assert check.status == "failed", check.said
    assert "In float32, too, it differs by" in check.said
    assert "experts" not in check.said
    with pytest.raises(VerificationError, match="does not answer as the adapted one"):
        msplora.to_merged(adapter, tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()
