"""An adapted `nn.MultiheadAttention`: two projections, one of which it reads past its layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msplora
from msplora.errors import TargetError
from oracle import plan_of, randomise, root_of
from plain_models import check_roads, clone, close, run, wrapped


class Attentive(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def attention_oracle(base: nn.Module, model: Any, x: Tensor) -> Tensor:
    weights = {}
    for site in plan_of(model).sites:
        inner = site.key.endswith("out_proj")
        name = f"{site.key}.weight" if inner else f"{site.key}.in_proj_weight"
        weight = base.get_parameter(name)
        for pair in plan_of(model).pairs_of[site.key]:
            a, b, scale = msplora.factors(model)[pair.address]
            weight = weight + scale * b @ a
        weights[name] = weight.detach()
    return torch.func.functional_call(base, weights, (x,))


def test_multihead_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Attentive().train()  # in eval its fused kernel reads weights directly
    x = torch.randn(2, 5, 8)
    model = wrapped(clone(base), target_modules=["self_attn"]).train()
    assert close(run(model, x), run(base, x))
    randomise(model)
    plan = plan_of(model)
    assert sorted(kind.name for kind in plan.kinds) == ["self_attn", "self_attn.out_proj"]
    expected = attention_oracle(base, model, x).detach()
    assert close(run(model, x), expected)
    model(x).pow(2).sum().backward()
    assert all(bool(its.grad.any()) for its in model.parameters() if its.requires_grad)
    assert close(run(model.eval(), x), expected)
    check_roads(model, base.eval(), x, tmp_path)


class Decoder(nn.Module):
    """Attends to one thing by another, as the decoders of Mask2Former and OneFormer do."""

    def __init__(self, by_keyword: bool) -> None:
        super().__init__()
        self.by_keyword = by_keyword
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attend": nn.MultiheadAttention(8, 2, batch_first=True)})
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            attend: Any = layer["attend"]  # pyright: ignore[reportIndexIssue]
            key, value = x.flip(1), x[:, 1:].cos()
            if self.by_keyword:
                found, _ = attend(value=value, query=x, key=key[:, 1:], need_weights=False)
            else:
                found, _ = attend(x, key[:, 1:], value, need_weights=False)
            x = x + found
        return x


def test_an_attention_may_be_called_by_keyword(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Decoder(by_keyword=True).eval()
    x = torch.randn(2, 5, 8)
    model = wrapped(clone(base), target_modules=["attend"])
    assert close(run(model, x), run(base, x))
    randomise(model)
    found = run(model, x)
    assert close(found, attention_oracle(base, model, x).detach())
    assert not close(found, run(base, x))
    root_of(model).by_keyword = False
    assert close(run(model, x), found)
    root_of(model).by_keyword = True
    with model.disable_adapter():
        assert close(run(model, x), run(base, x))
    model.train()(x).pow(2).sum().backward()
    assert all(bool(its.grad.any()) for its in model.parameters() if its.requires_grad)
    check_roads(model.eval(), base, x, tmp_path)


def test_half_of_an_attention_is_not_left_out() -> None:
    said = r"exclude_modules = .*'layers.0.self_attn.out_proj'.* Leave out 'layers.0.self_attn'"
    with pytest.raises(TargetError, match=said):
        wrapped(Attentive(), target_modules=["self_attn"], exclude_modules=["out_proj"])
    model = wrapped(Attentive(), target_modules=["self_attn"], exclude_modules=r".*\.1\..*")
    assert {site.block for site in plan_of(model).sites} == {0, 2}


@pytest.mark.parametrize("targets", [["self_attn"], ["linear1", "linear2"], "all-linear"], ids=str)
def test_the_fused_kernel_of_an_encoder_layer_does_not_pass_an_adapter_by(targets: Any) -> None:
    torch.manual_seed(0)
    base = Attentive().eval()
    x = torch.randn(2, 5, 8)
    model = wrapped(clone(base), target_modules=targets)
    randomise(model)
    evaluated = run(model.eval(), x)
    assert close(evaluated, run(model.train(), x))
    assert not close(evaluated, run(base, x))
    model.eval()
    assert close(run(copy.deepcopy(model), x), evaluated)
    plain = model.merge_and_unload()
    assert close(run(plain, x), evaluated)
    assert not [module for module in plain.modules() if module._forward_pre_hooks]


def test_an_attention_with_dora_is_refused() -> None:
    with pytest.raises(TargetError, match=r"self_attn.*not support DoRA.*use_dora to False"):
        wrapped(Attentive(), target_modules=["self_attn"], use_dora=True)


def test_an_attention_over_keys_of_another_width_is_refused_when_planned() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=6, vdim=4))
    with pytest.raises(TargetError, match=r"'0' has kdim=6 and vdim=4 .* embed_dim=8"):
        msplora.plan(model, msplora.MSPLoraConfig(target_modules=["0"]))


def test_inside_a_multihead_attention_nothing_can_be_adapted() -> None:
    with pytest.raises(TargetError, match=r"nn.MultiheadAttention.*'layers.0.self_attn'"):
        wrapped(Attentive(), target_modules=["out_proj"])


def test_all_linear_leaves_the_inside_of_a_multihead_attention_alone() -> None:
    model = wrapped(Attentive(), target_modules="all-linear")
    assert {kind.name for kind in plan_of(model).kinds} == {"linear1", "linear2"}
