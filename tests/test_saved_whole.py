"""What an adapter's file holds whole, embeddings above all: kept, refused or left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import msplora
from msplora.errors import UnsupportedError
from msplora.verifying import VerificationError
from runs import msplora as command
from tiny import VOCABULARY, llama

EMBEDDING = "base_model.model.model.embed_tokens.weight"


def save(
    folder: Path,
    config: Any = msplora.MSPLoraConfig,
    *,
    rows: int | None = None,
    moved: float = 0.0,
    whole: Any = "auto",
    tied: bool = False,
    **options: Any,
) -> Path:
    """A Llama and an adapter of it: after resizing, and with embeddings that were trained."""
    torch.manual_seed(0)
    base: Any = llama(2, tie_word_embeddings=tied)
    base.save_pretrained(folder / "base")
    model: Any = LlamaForCausalLM.from_pretrained(str(folder / "base"))
    if rows:
        model.resize_token_embeddings(rows)
    options = {"target_modules": ["q_proj"], "init_lora_weights": False} | options
    model = get_peft_model(model, config(r=4, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(moved)
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=whole)
    return folder / "adapter"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "options",
    [{"moved": 0.1, "whole": True}, {"modules_to_save": ["model.embed_tokens"]}, {"rows": 70}],
    ids=["trained", "named by its path", "resized"],
)
def test_servers_are_not_given_half_an_adapter(tmp_path: Path, options: Any) -> None:
    adapter = save(tmp_path, **options)
    assert EMBEDDING in tensors(adapter)
    for form, server in (("lora", "vllm"), ("lora", "sglang"), ("gguf", None), ("mlx", None)):
        with pytest.raises(
            UnsupportedError, match=r"cannot serve this adapter .*(embed_tokens|lm_head)"
        ):
            msplora.to_lora(adapter, tmp_path / "out", form=form, server=server, verify=False)  # pyright: ignore
    msplora.to_lora(adapter, tmp_path / "lora")
    assert torch.equal(tensors(tmp_path / "lora")[EMBEDDING], tensors(adapter)[EMBEDDING])


def test_embeddings_that_are_the_base_s_own_are_left_out(tmp_path: Path) -> None:
    adapter = save(tmp_path, whole=True)
    assert EMBEDDING in tensors(adapter)
    msplora.to_lora(adapter, tmp_path / "out", server="vllm")
    assert all(".lora_" in name for name in tensors(tmp_path / "out"))


def test_embeddings_that_were_lost_on_the_way_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base they are looked for on is not the one that the adapter has overwritten."""
    adapter = save(tmp_path, moved=0.1, whole=True)
    right = msplora.forms.save_file  # pyright: ignore

    def forgetful(its: dict[str, torch.Tensor], *rest: Any, **more: Any) -> None:
        right({key: tensor for key, tensor in its.items() if "embed" not in key}, *rest, **more)

    monkeypatch.setattr("msplora.forms.save_file", forgetful)
    with pytest.raises(VerificationError, match=r"embed_tokens.weight' is not in the model"):
        msplora.to_lora(adapter, tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_is_converted(tmp_path: Path, tied: bool) -> None:
    adapter = save(tmp_path, rows=VOCABULARY + 6, tied=tied, moved=0.1)
    msplora.to_lora(adapter, tmp_path / "lora")
    assert "resize_token_embeddings(70)" in (tmp_path / "lora" / "README.md").read_text()
    msplora.to_merged(adapter, tmp_path / "merged")
    merged: Any = LlamaForCausalLM.from_pretrained(str(tmp_path / "merged"))
    assert torch.equal(merged.get_input_embeddings().weight, tensors(adapter)[EMBEDDING])
    plain = save(tmp_path / "plain", LoraConfig, rows=VOCABULARY + 6, tied=tied, moved=0.1)
    found = msplora.to_msplora(plain, tmp_path / "back", ranks=[4], groups=[0])
    assert found.explained == pytest.approx(1)
    assert torch.equal(tensors(tmp_path / "back")[EMBEDDING], tensors(plain)[EMBEDDING])


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
@pytest.mark.parametrize("whole", [True, False])
def test_a_lora_is_whole_with_and_without_the_base_s_embeddings(
    tmp_path: Path, targets: list[str], whole: bool
) -> None:
    adapter = save(tmp_path, LoraConfig, whole=whole, target_modules=targets)
    assert msplora.to_msplora(
        adapter, tmp_path / "back", ranks=[4], groups=[0]
    ).explained == pytest.approx(1)


def test_no_server_is_named_that_cannot_serve_it(tmp_path: Path) -> None:
    adapter = save(tmp_path, use_dora=True)
    done = command("convert", adapter, tmp_path / "lora", "--to", "lora")
    assert done.code == 0, done.error
    assert "vllm serve" not in done.out
    assert "vLLM cannot serve this adapter (use_dora)" in done.out.replace("\n", " ")
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "every LoRA server" not in card
    assert "vLLM cannot serve this adapter (use_dora): it knows no DoRA" in card
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["use_dora"]
