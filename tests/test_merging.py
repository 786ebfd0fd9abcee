"""Merges that are none: into a weight of several places, or a base that is another each time."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

import msplora
from analysed import edit
from msplora import merging
from msplora.errors import UnsupportedError
from msplora.rewritten_base import RewrittenBaseWarning
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


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("pissa_niter_1", "random decomposition"),
        pytest.param(
            "lora_ga",
            "saw of its data",
            marks=pytest.mark.skipif(not hasattr(peft, "LoraGAConfig"), reason="not in this PEFT"),
        ),
        ("pissa", ""),
    ],
)
def test_a_start_that_no_loading_repeats_is_said(start: str, said: str, tmp_path: Path) -> None:
    changes = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    base, adapter = save(tmp_path, "llama", torch.float32, **changes)
    edit(adapter, init_lora_weights=start)
    found = msplora.doctor(base, adapter)
    check = found["made for this base"]
    assert said in check.said
    assert ("path_initial_model_for_weight_conversion" in check.advice) == bool(said)
    assert f"less what {start} took" in found["changes the output"].said
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        msplora.to_merged(adapter, tmp_path / "merged", base=base)
    assert any(its.category is RewrittenBaseWarning for its in warned) == bool(said)


def test_a_start_that_cannot_be_loaded_is_not_the_bases_fault(tmp_path: Path) -> None:
    changes = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    base, adapter = save(tmp_path, "llama", torch.float32, **changes)
    edit(adapter, init_lora_weights="corda")
    check = msplora.doctor(base, adapter)["made for this base"]
    assert check.status == "failed"
    assert "path_initial_model_for_weight_conversion" in check.advice
