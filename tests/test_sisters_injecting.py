"""Adding a sister's adapter: what is refused, and that the model is then as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from adapted_llama import LLAMA
from msplora.errors import TargetError, UnsupportedError
from msplora.sisters import ElaLoraConfig, HydraConfig
from oracle import snapshot


@pytest.fixture(params=[HydraConfig, ElaLoraConfig])
def config_of(request: pytest.FixtureRequest) -> Any:
    return request.param


class Net(nn.Module):
    """Linear layers first: a refusal of the others comes when those are adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.table = nn.Embedding(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.first(x))
        return self.attention(x, x, x)[0]


def inject(model: Any, wanted: Any) -> Any:
    return inject_adapter_in_model(wanted, model)


@pytest.mark.parametrize("add", [get_peft_model, inject], ids=["peft", "inject"])
def test_a_refused_adapter_leaves_the_base_as_it_was(config_of: Any, add: Any) -> None:
    base = Net()
    before = snapshot(base)
    with pytest.raises(UnsupportedError, match="'table' is a Embedding"):
        add(base, config_of(target_modules=["first", "table"]))
    assert snapshot(base) == before


def test_what_peft_refuses_at_the_end_leaves_the_base_as_it_was(config_of: Any) -> None:
    base = Net()
    before = snapshot(base)
    with pytest.raises(TypeError, match="ModuleList"):
        get_peft_model(base, config_of(target_modules=["first"], modules_to_save=["blocks"]))
    assert snapshot(base) == before


def test_a_refused_second_adapter_leaves_the_first_as_it_was(config_of: Any) -> None:
    model: Any = get_peft_model(Net(), config_of(target_modules=["first"], init_lora_weights=False))
    x = torch.randn(2, 3, 8)
    before, expected = snapshot(model), model(x)
    with pytest.raises(UnsupportedError, match="'table'"):
        model.add_adapter("second", config_of(target_modules=["first", "0", "table"]))
    assert snapshot(model) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(x), expected)
    model.add_adapter("second", config_of(target_modules=["first", "0"]))
    assert torch.equal(model(x), expected)


def test_a_refused_rank_pattern_leaves_the_base_as_it_was() -> None:
    base = Net()
    before = snapshot(base)
    with pytest.raises(TargetError, match="Did you mean 'first'"):
        get_peft_model(base, ElaLoraConfig(target_modules=["first"], rank_pattern={"frist": 2}))
    assert snapshot(base) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": ["q_proj", "v_prjo"]}, "'v_prjo'.*Did you mean 'v_proj'"),
        ({"layers_to_transform": [0, 99]}, r"\[99\].*blocks 0 to 3"),
        ({"exclude_modules": ["o_prjo"]}, "'o_prjo'.*Did you mean 'o_proj'"),
    ],
    ids=["target", "layer", "excluded"],
)
def test_a_name_of_nothing_is_refused(config_of: Any, changes: dict[str, Any], said: str) -> None:
    base = LLAMA.model()
    before = snapshot(base)
    with pytest.raises(TargetError, match=said):
        get_peft_model(base, config_of(**({"target_modules": ["q_proj"]} | changes)))
    assert snapshot(base) == before


def test_what_is_read_past_its_layer_is_refused(config_of: Any) -> None:
    with pytest.raises(TargetError, match="would never act"):
        get_peft_model(Net(), config_of(target_modules=["out_proj"]))
    config = hf.MambaConfig(vocab_size=16, hidden_size=16, state_size=4, num_hidden_layers=1)
    base = hf.MambaForCausalLM(config)
    before = snapshot(base)
    for name in ("out_proj", "conv1d"):
        with pytest.raises(UnsupportedError, match=f"'{name}' is incompatible with Mamba"):
            get_peft_model(base, config_of(target_modules=["in_proj", name]))
        assert snapshot(base) == before
    get_peft_model(base, config_of(target_modules=["in_proj"]))
