"""Models that are no transformers, and models with awkward names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DistilBertConfig, DistilBertForSequenceClassification

import msplora
from msplora.errors import TargetError
from oracle import (
    Untied,
    assert_shared,
    layer_of,
    plan_of,
    randomise,
    root_of,
    snapshot,
    trainable,
)
from plain_models import Bag, check_roads, clone, close, factors, run, wrapped
from tiny import MODELS, VOCABULARY

# Plain modules


def test_a_plain_sequential(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)]).eval()
    x = torch.randn(3, 8)
    model = wrapped(clone(base), target_modules=["0", "2", "3", "4"])
    randomise(model)
    plan = plan_of(model)
    (kind,) = plan.kinds
    assert (kind.name, kind.layers) == ("self", 4)
    untied = Untied(base, model, plan)
    assert close(run(model, x), torch.func.functional_call(base, untied.weights, (x,)))
    check_roads(model, base, x, tmp_path)


class Nested(nn.Module):
    """Lists in lists, in modules of their own, beside a part outside every list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.stages = nn.ModuleList(
            nn.Sequential(*[nn.ModuleDict({"up": nn.Linear(8, 8)}) for _ in range(2)])
            for _ in range(3)
        )
        self.tower = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(8, 8) for _ in range(4))})

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            for step in stage:
                x = torch.tanh(step["up"](x))
        for layer in self.tower["layers"]:
            x = torch.tanh(layer(x))
        return x


def test_nested_modules(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Nested().eval()
    x = torch.randn(3, 8)
    with pytest.warns(UserWarning, match="stem: outside every list"):
        model = wrapped(clone(base), target_modules="all-linear")
    randomise(model)
    plan = plan_of(model)
    # The outermost list counts the depth; the number in the inner one tells kinds apart.
    assert {(kind.stack, kind.path, kind.layers) for kind in plan.kinds} == {
        ("stages", "0.up", 3),
        ("stages", "1.up", 3),
        ("tower.layers", "self", 4),
        ("stem", "stem", 1),
    }
    assert_shared(model, plan)
    untied = Untied(base, model, plan)
    assert close(run(model, x), torch.func.functional_call(base, untied.weights, (x,)))
    check_roads(model, base, x, tmp_path)


@pytest.mark.filterwarnings("ignore:.*outside every list")
def test_a_single_linear_layer_is_a_pyramid_of_one() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.only(x)

    torch.manual_seed(0)
    base = One()
    model = wrapped(clone(base), target_modules=["only"], r=4)
    randomise(model)
    weight = base.only.weight + sum(scale * b @ a for a, b, scale in factors(model))
    x = torch.randn(5, 4)
    assert close(run(model, x), F.linear(x, weight, base.only.bias))
    for shape in [(4,), (0, 4), (2, 3, 4), (2, 0, 4)]:
        x = torch.randn(shape)
        assert close(run(model, x), F.linear(x, weight, base.only.bias))


# Awkward names


def distilbert() -> Any:
    torch.manual_seed(0)
    return DistilBertForSequenceClassification(
        DistilBertConfig(
            n_layers=3, dim=32, hidden_dim=48, n_heads=4, vocab_size=VOCABULARY, num_labels=3
        )
    ).eval()


@pytest.mark.filterwarnings("ignore:.*outside every list")
def test_a_kind_that_ends_like_a_module_to_save(tmp_path: Path) -> None:
    ids = MODELS["bert"].batch()["input_ids"]
    model = wrapped(
        distilbert(),
        target_modules="all-linear",
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    # PEFT takes for a module to save whatever ends in its name, so this one is trained whole.
    plan = plan_of(model)
    assert {"pre_classifier", "classifier"}.isdisjoint(site.key for site in plan.sites)
    whole = [distilbert().classifier, distilbert().pre_classifier]
    numbers = sum(parameter.numel() for module in whole for parameter in module.parameters())
    assert trainable(model) == plan.parameters + numbers
    randomise(model)
    with torch.no_grad():
        for parameter in model.classifier.modules_to_save["default"].parameters():
            parameter += 0.2
        expected = model(ids).logits
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert sum(tensor.numel() for tensor in saved.values()) == trainable(model)
        for options in ({}, {"low_cpu_mem_usage": True}):
            loaded = PeftModel.from_pretrained(distilbert(), tmp_path, **options).eval()
            assert torch.equal(loaded(ids).logits, expected)
        model.add_adapter("other", msplora.MSPLoraConfig(target_modules=["q_lin"]))
        model.delete_adapter("other")
        assert torch.equal(model(ids).logits, expected)
        assert close(model.merge_and_unload()(ids).logits, expected)


def test_a_target_that_is_a_module_to_save_as_well_is_refused() -> None:
    base = distilbert()
    before = snapshot(base)
    with pytest.raises(TargetError, match=r"'pre_classifier'.*modules_to_save.*'classifier'"):
        wrapped(base, target_modules=["q_lin", "pre_classifier"], modules_to_save=["classifier"])
    assert snapshot(base) == before


@pytest.mark.parametrize(("module", "adapter"), [("pair", "default"), ("head", "head")])
def test_a_module_to_save_that_sounds_like_the_adapter_is_refused(
    module: str, adapter: str
) -> None:
    base = Awkward("lin")
    base.add_module(module, nn.Linear(2, 2))
    before = snapshot(base)
    config = msplora.MSPLoraConfig(target_modules=["lin"], modules_to_save=[module])
    with pytest.raises(msplora.MSPLoraError, match="another name"):
        get_peft_model(base, config, adapter_name=adapter)
    assert snapshot(base) == before


class Awkward(nn.Module):
    """A base whose own names look like the adapter's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(8, 8)}) for _ in range(4))
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer[self.name](x))
        return x


AWKWARD = ["msplora_A", "msplora_", "pair", "site", "lora_A", "default", "factor", "weight_proj"]


@pytest.mark.parametrize("name", AWKWARD)
def test_a_base_with_names_like_the_adapters(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Awkward(name).eval()
    x = torch.randn(3, 8)
    model = wrapped(clone(base), target_modules=[name])
    randomise(model)
    plan = plan_of(model)
    assert_shared(model, plan)
    untied = Untied(base, model, plan)
    assert close(run(model, x), torch.func.functional_call(base, untied.weights, (x,)))
    check_roads(model, base, x, tmp_path)


def test_a_base_that_has_an_attribute_of_the_stores_name() -> None:
    base = Awkward("lin")
    base.pyramid_store = nn.Linear(2, 2)
    before = snapshot(base)
    with pytest.raises(TargetError, match="pyramid_store"):
        wrapped(base, target_modules=["lin"])
    assert snapshot(base) == before


def test_two_adapters_on_different_layouts() -> None:
    torch.manual_seed(0)
    base = Bag().eval()
    x = torch.randint(1, VOCABULARY, (3, 5))
    with pytest.warns(UserWarning, match="outside every list"):
        model = wrapped(clone(base), target_modules=["embedding"])
    model.add_adapter("second", msplora.MSPLoraConfig(target_modules=["1"], r=4))
    for name in ("default", "second"):
        randomise(model, name)
        model.set_adapter(name)
        untied = Untied(base, model, plan_of(model, name), name)
        assert close(run(model, x), torch.func.functional_call(base, untied.weights, (x,)))
    assert layer_of(root_of(model), "blocks.1").active_adapters == ["second"]
