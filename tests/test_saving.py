"""A state dict that holds an adapter by halves is refused, and not saved as if it were whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from adapted_llama import LLAMA, adapted, config, logits, two_adapters
from msplora.errors import AdapterFileError
from msplora.train import freeze_levels

WEIGHTS = "adapter_model.safetensors"


def kept(model: Any, state_dict: dict[str, Tensor] | None, name: str = "default") -> dict[str, Any]:
    return peft.get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=name)


def what_trains(model: Any) -> dict[str, Tensor]:
    """As DeepSpeed gives a state dict without frozen parameters."""
    return {name: its for name, its in model.named_parameters() if its.requires_grad}


def refused(model: Any, state_dict: dict[str, Tensor] | None, folder: Path, says: str) -> None:
    for save in (kept, lambda model, its: model.save_pretrained(folder, state_dict=its)):
        with pytest.raises(AdapterFileError, match=rf"(?s){says}"):
            save(model, state_dict)
    assert not (folder / WEIGHTS).exists()


@pytest.mark.parametrize("share", ["empty", "flat"])
@pytest.mark.parametrize("given", [True, False], ids=["given", "of the model"])
def test_shares_that_nobody_gathered_are_refused(tmp_path: Path, share: str, given: bool) -> None:
    """As ZeRO-3 and FSDP leave a parameter in a process."""
    model = adapted()
    state_dict = model.state_dict()
    for name, parameter in model.named_parameters():
        if "msplora_" in name:
            part = parameter.detach().flatten()[: 0 if share == "empty" else 5].clone()
            state_dict[name] = part
            if not given:
                parameter.data = part
    says = r"'default'.*msplora_A\.default\.factor has shape \(\d,\).*accelerator.get_state_dict"
    refused(model, state_dict if given else None, tmp_path, says)


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=str)
def test_frozen_levels_that_a_state_dict_leaves_out_are_missed(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = adapted(**changes)
    expected = logits(model)
    model.save_pretrained(tmp_path / "whole", state_dict=what_trains(model))
    reloaded = PeftModel.from_pretrained(LLAMA.model(), tmp_path / "whole").eval()
    assert torch.equal(logits(reloaded), expected)
    freeze_levels(model, ["global"])
    says = r"global/0/self_attn[^\n]*is missing.*exclude_frozen_parameters"
    refused(model, what_trains(model), tmp_path, says)
    model.save_pretrained(tmp_path / "again", state_dict=model.state_dict())
    reloaded = PeftModel.from_pretrained(LLAMA.model(), tmp_path / "again").eval()
    assert torch.equal(logits(reloaded), expected)


def test_a_magnitude_that_is_missing_is_missed(tmp_path: Path) -> None:
    model = adapted(use_dora=True)
    state_dict = model.state_dict()
    key = next(key for key in state_dict if "msplora_magnitude" in key)
    refused(model, state_dict | {key: torch.empty(0)}, tmp_path, r"magnitude.*has shape \(0,\)")
    del state_dict[key]
    refused(model, state_dict, tmp_path, r"magnitude\.default\.weight is missing")


def test_a_frozen_copy_of_an_adapter_may_be_left_out() -> None:
    """TRL's reference, under ZeRO-3: the adapter that trains is saved all the same."""
    model = two_adapters()
    state_dict = what_trains(model)
    with pytest.warns(UserWarning, match=r"'second' does not train.*nothing in its file"):
        assert not kept(model, state_dict, "second")
    assert kept(model, state_dict).keys() == kept(model, None).keys()


def test_processes_that_write_nothing_need_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the others no process gathers a state dict, or gives an empty one."""
    model = adapted()
    assert kept(model, {}) == {}
    state_dict = {"base_model.model.lm_head.weight": torch.zeros(2, 2)}
    with pytest.raises(AdapterFileError, match="is missing"):
        kept(model, state_dict)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert kept(model, state_dict) == {}
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(AdapterFileError, match="is missing"):
        kept(model, state_dict)


def test_every_adapter_is_checked_by_its_own_plan() -> None:
    model = adapted()
    model.add_adapter("second", config(r=4, target_modules=["q_proj"]))
    state_dict = model.state_dict()
    for name in ("default", "second"):
        found = kept(model, state_dict, name)
        assert found.keys() == kept(model, None, name).keys()
    key = next(key for key in state_dict if ".second." in key)
    del state_dict[key]
    assert kept(model, state_dict)
    with pytest.raises(AdapterFileError, match="'second'"):
        kept(model, state_dict, "second")
