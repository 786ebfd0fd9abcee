"""Layers other than a linear one: convolutions, embeddings, parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import msplora
from msplora.errors import MSPLoraError, TargetError
from oracle import (
    Untied,
    assert_shared,
    plan_of,
    randomise,
    term,
    trainable,
    watched,
)
from plain_models import Bag, check_roads, clone, close, factors, run, wrapped
from tiny import EXPERTS_ARE_PARAMETERS, MODELS, VOCABULARY, llama

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")


# Convolutions

CONVOLUTIONS = {
    "1d": lambda: nn.Conv1d(8, 8, 3, padding=1),
    "1d strided": lambda: nn.Conv1d(8, 8, 3, padding=1, stride=2),
    "1d pointwise": lambda: nn.Conv1d(8, 8, 1),
    "2d": lambda: nn.Conv2d(8, 8, (3, 2), padding=(1, 0)),
    "2d pointwise": lambda: nn.Conv2d(8, 8, 1, bias=False),
    "2d same": lambda: nn.Conv2d(8, 8, 3, padding="same"),
    "2d grouped": lambda: nn.Conv2d(8, 8, 3, groups=2, padding=1),
    "1d depthwise": lambda: nn.Conv1d(8, 8, 3, groups=8, padding=1),
    "3d": lambda: nn.Conv3d(8, 8, 2),
}


class Convolutions(nn.Module):
    def __init__(self, make: Any, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = nn.Module()
            block.mix = make()
            self.blocks.append(block)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block.mix(x))
        return x


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Convolutions(CONVOLUTIONS[name]).double().eval()
    dimensions = int(name[0])
    x = torch.randn(2, 8, *[17, 11, 7][-dimensions:], dtype=torch.float64)
    groups = base.blocks[0].mix.groups
    before = run(base, x)
    ranks = [16, 8, 8] if groups == 8 else [8, 4, 2]
    model = wrapped(clone(base), target_modules=["mix"], ranks=ranks)
    assert torch.equal(run(model, x), before)
    randomise(model)
    plan = plan_of(model)
    assert_shared(model, plan)
    with watched(model, plan) as calls:
        model(x)
        assert len(calls) == 4
        for call in calls:
            terms = [
                term(call.site, call.base(), call.x, *msplora.factors(model)[pair.address])
                for pair in plan.pairs_of[call.site.key]
            ]
            assert all(bool(its.any()) for its in terms)
            assert close(call.change(), sum(terms))
    # PEFT's LoRA does not merge grouped convolutions either.
    check_roads(model, base, x, tmp_path, merges=groups == 1)
    if groups > 1:
        with pytest.raises(NotImplementedError, match="groups"):
            model.merge_adapter()


def test_ranks_that_a_convolutions_groups_do_not_divide_are_refused() -> None:
    base = Convolutions(CONVOLUTIONS["2d grouped"])
    with pytest.raises(TargetError, match=r"2 groups.*'local' has rank 1.*multiples of 2"):
        wrapped(base, target_modules=["mix"], r=4)
    assert type(base.blocks[0].mix) is nn.Conv2d


@pytest.mark.parametrize(
    "options", [{"dilation": 2}, {"padding_mode": "circular", "padding": 1}], ids=str
)
def test_convolutions_that_lora_would_compute_otherwise_are_refused(options: dict) -> None:
    base = Convolutions(lambda: nn.Conv2d(8, 8, 3, **options))
    with pytest.raises(TargetError, match=next(iter(options))):
        wrapped(base, target_modules=["mix"])


def test_a_real_convolutional_classifier(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    base = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12], depths=[3, 3], layer_type="basic", num_labels=3
        )
    ).eval()
    model = wrapped(clone(base), target_modules=["convolution"])
    randomise(model)
    plan = plan_of(model)
    x = torch.randn(2, 3, 32, 32)
    with watched(model, plan) as calls:
        model(x)
        assert {call.site.key for call in calls} == {site.key for site in plan.sites}
        for call in calls:
            terms = [
                term(call.site, call.base(), call.x, *msplora.factors(model)[pair.address])
                for pair in plan.pairs_of[call.site.key]
            ]
            assert close(call.change(), sum(terms), 1e-4)


# Embeddings


def test_an_embedding_and_blocks_that_are_the_layers_themselves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Bag().eval()
    x = torch.randint(1, VOCABULARY, (3, 5))
    before = run(base, x)
    with pytest.warns(UserWarning, match="embedding: outside every list of blocks"):
        model = wrapped(clone(base), target_modules=["embedding", "0", "1", "2"])
    assert torch.equal(run(model, x), before)
    randomise(model)
    plan = plan_of(model)
    assert {(kind.name, kind.layers) for kind in plan.kinds} == {("embedding", 1), ("self", 3)}
    assert_shared(model, plan)
    assert close(run(model, x), Untied(base, model, plan_of(model)).base(x)) is False
    untied = Untied(base, model, plan)
    assert close(run(model, x), torch.func.functional_call(base, untied.weights, (x,)))
    check_roads(model, base, x, tmp_path)


def test_an_embedding_cannot_start_orthogonal() -> None:
    with (
        pytest.warns(UserWarning, match="outside every list"),
        pytest.raises(MSPLoraError, match=r"'orthogonal' needs.*linear.*'embedding'"),
    ):
        wrapped(Bag(), target_modules=["embedding"], init_lora_weights="orthogonal")


def test_the_embedding_of_a_language_model() -> None:
    torch.manual_seed(0)
    base = llama(3).eval()
    batch = MODELS["llama"].batch()
    model = get_peft_model(
        clone(base), msplora.MSPLoraConfig(target_modules=["embed_tokens", "lm_head", "up_proj"])
    ).eval()
    randomise(model)
    with torch.no_grad():
        expected = Untied(base, model, plan_of(model))(**batch).logits
        assert close(model(**batch).logits, expected, 1e-4)


# nn.Parameter


on_expert_parameters = pytest.mark.skipif(
    not EXPERTS_ARE_PARAMETERS, reason="before transformers 5, experts were linear layers"
)


def test_a_linear_layers_parameter_as_a_target() -> None:
    torch.manual_seed(0)
    base = llama(4).eval()
    batch = MODELS["llama"].batch()
    model = get_peft_model(
        clone(base),
        msplora.MSPLoraConfig(target_modules=[], target_parameters=["q_proj.weight"]),
    ).eval()
    randomise(model)
    plan = plan_of(model)
    assert {site.shape.layout for site in plan.sites} == {"experts"}
    with torch.no_grad():
        expected = Untied(base, model, plan)(**batch).logits
        assert close(model(**batch).logits, expected)
        assert not close(expected, base(**batch).logits)


def test_parameters_of_some_blocks_beside_modules_of_the_same() -> None:
    blocks = [0, 2]
    config = msplora.MSPLoraConfig(
        target_modules=["v_proj"],
        target_parameters=[f"model.layers.{block}.self_attn.q_proj.weight" for block in blocks],
        layers_to_transform=blocks,
        exclude_modules=["k_proj", "lm_head"],
    )
    plan = plan_of(get_peft_model(llama(4), config))
    assert sorted((site.block, site.key.split(".")[4]) for site in plan.sites) == [
        (block, name) for block in blocks for name in ("q_proj", "v_proj")
    ]


@on_expert_parameters
def test_parameters_alone_are_adapted_where_the_model_has_default_modules() -> None:
    """PEFT fills in target_modules of its own for Mixtral where they are unset."""
    tiny = MODELS["mixtral"]
    config = msplora.MSPLoraConfig(target_parameters=list(tiny.parameters))
    plan = plan_of(get_peft_model(tiny.model(), config))
    assert {site.shape.layout for site in plan.sites} == {"experts"}
    assert plan.parameters == msplora.plan(tiny.model(), config).parameters


def test_a_parameter_that_a_parametrisation_computes_is_adapted_on_top_of_it() -> None:
    class PlusOne(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight + 1

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 4, bias=False))
    register_parametrization(base[0], "weight", PlusOne())
    weight = base[0].weight.detach().clone()
    model = wrapped(base, target_modules=[], target_parameters=["0.weight"])
    randomise(model)
    delta = sum(scale * b @ a for a, b, scale in factors(model))
    x = torch.randn(3, 6)
    assert close(run(model, x), x @ (weight + delta).t())


def test_a_parameter_of_the_model_itself_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 6))

    with pytest.raises(TargetError, match=r"top-level module is not supported"):
        wrapped(Bare(), target_modules=[], target_parameters=["weight"])


@on_expert_parameters
def test_experts_share_per_parameter_and_keep_their_own_row_per_expert() -> None:
    tiny = MODELS["mixtral"]
    model = get_peft_model(
        tiny.model(),
        msplora.MSPLoraConfig(target_modules=[], target_parameters=list(tiny.parameters)),
    ).eval()
    plan = plan_of(model)
    assert len(plan.kinds) == 2
    for pair in plan.pairs:
        a, b, _ = msplora.factors(model)[pair.address]
        assert a.shape[0] == b.shape[1] == 4 * pair.rank
    assert_shared(model, plan)
    assert trainable(model) == plan.parameters


@on_expert_parameters
@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.20"),
    reason="PEFT before 0.20 takes one adapter with target_parameters",
)
def test_a_second_adapter_on_experts() -> None:
    tiny = MODELS["mixtral"]
    config = {"target_modules": ["q_proj"], "target_parameters": list(tiny.parameters)}
    model = get_peft_model(tiny.model(), msplora.MSPLoraConfig(**config)).eval()
    randomise(model)
    with torch.no_grad():
        first = model(**tiny.batch()).logits
        model.add_adapter("second", msplora.MSPLoraConfig(**config, r=4))
        randomise(model, "second", seed=8)
        assert torch.equal(model(**tiny.batch()).logits, first)
        model.set_adapter("second")
        plan = plan_of(model, "second")
        assert_shared(model, plan, "second")
        expected = Untied(tiny.model(), model, plan, "second")(**tiny.batch()).logits
        assert close(model(**tiny.batch()).logits, expected)
        model.base_model.set_adapter(["default", "second"])
        both = model(**tiny.batch()).logits
        assert not close(both, expected)
        assert not close(both, first)
        model.delete_adapter("second")
        model.set_adapter("default")
        assert torch.equal(model(**tiny.batch()).logits, first)


@on_expert_parameters
def test_a_mixed_batch_over_experts_is_refused() -> None:
    tiny = MODELS["mixtral"]
    model = get_peft_model(
        tiny.model(),
        msplora.MSPLoraConfig(target_modules=[], target_parameters=list(tiny.parameters)),
    ).eval()
    with pytest.raises(ValueError, match="mixed"):
        model(**tiny.batch(), adapter_names=["default", "__base__"])
