"""ElaLoRA's config, names and files: what others keep and read of an adapter whose ranks move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from msplora._peft import GOES_BY_NAMES
from msplora.errors import AdapterFileError
from msplora.sisters import ElaLoraConfig
from test_elalora import MOVING, TwoLayers, X, ranks, small, train


def moved() -> Any:
    adapted = small()
    train(adapted, batch={"x": X})
    assert len(set(ranks(adapted))) > 1
    return adapted.eval()


def base() -> TwoLayers:
    """The one that `small` adapts."""
    torch.manual_seed(0)
    return TwoLayers()


def test_moves_leave_the_callers_config_alone() -> None:
    config = ElaLoraConfig(r=3, target_modules=["first", "second"], **MOVING)
    first = get_peft_model(base(), config)
    train(first, batch={"x": X})
    assert len(set(ranks(first))) > 1
    assert not config.rank_pattern
    assert ranks(get_peft_model(base(), config)) == [3, 3]


def test_adapters_made_of_one_config_move_apart() -> None:
    adapted = small()
    mover, _ = train(adapted, batch={"x": X})
    adapted.add_adapter("second", adapted.peft_config["default"])
    configs = adapted.peft_config
    before = dict(configs["default"].rank_pattern)
    mover.move(next(iter(mover.layers.values())), [], 1, torch.Generator().manual_seed(0))
    assert configs["default"].rank_pattern != before
    assert configs["second"].rank_pattern == before


def test_a_copy_by_name_is_the_adapter() -> None:
    """As TRL's trainers make their reference of it."""
    adapted = moved()
    expected = adapted(X)
    adapted.add_adapter("ref", adapted.peft_config["default"])
    parameters = dict(adapted.named_parameters())
    for name, its in parameters.items():
        if ".default." in name:
            parameters[name.replace(".default.", ".ref.")].data.copy_(its.data)
    adapted.set_adapter("ref")
    assert torch.equal(adapted(X), expected)
    with adapted.disable_adapter():
        assert not torch.equal(adapted(X), expected)


def test_a_file_with_the_names_of_before_is_read(tmp_path: Path) -> None:
    adapted = moved()
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert all(name.endswith(".weight") for name in tensors)
    save_file({name.removesuffix(".weight"): its for name, its in tensors.items()}, file)
    again = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(again(X), adapted(X))


def test_a_whole_state_with_the_names_of_before_is_read() -> None:
    adapted, other = moved(), small().eval()
    state = {
        name.replace(".default.weight", ".default"): its
        for name, its in adapted.state_dict().items()
    }
    assert state.keys() != adapted.state_dict().keys()
    other.load_state_dict(state)
    assert torch.equal(other(X), adapted(X))


@pytest.mark.skipif(GOES_BY_NAMES, reason="PEFT before 0.21 asks no method about its files")
def test_an_adapter_of_another_rank_is_not_loaded_into_this_one(tmp_path: Path) -> None:
    small(r=4).save_pretrained(tmp_path)
    adapted = small()
    with pytest.raises(AdapterFileError, match=r"has 8 ranks in all.*has 6.*under a new name"):
        adapted.load_adapter(str(tmp_path), "default")
    assert ranks(adapted) == [3, 3]
    adapted.load_adapter(str(tmp_path), "other")
    assert [its.r["other"] for its in adapted.modules() if hasattr(its, "elalora_E")] == [4, 4]
