"""Layers other than a linear one in a transformer block, and models with awkward names."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DistilBertConfig, DistilBertForSequenceClassification

import msplora
from msplora.convert import lora_of
from msplora.errors import TargetError
from oracle import (
    Untied,
    assert_shared,
    layer_of,
    plan_of,
    randomise,
    root_of,
    same_tensors,
    snapshot,
    tensors_of,
    term,
    trainable,
    watched,
)
from tiny import MODELS, VOCABULARY, llama

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    scale = max([1.0, *expected.detach().abs().flatten().tolist()])
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def wrapped(model: nn.Module, **changes: Any) -> Any:
    return get_peft_model(model, msplora.MSPLoraConfig(**changes)).eval()


def check_roads(model: Any, fresh: nn.Module, x: Tensor, folder: Path, merges: bool = True) -> None:
    """Counting, reloading, the exported LoRA and merging, on a model with random factors."""
    plan = plan_of(model)
    assert trainable(model) == plan.parameters
    expected = run(model, x)
    model.save_pretrained(folder / "own", save_embedding_layers=False)
    saved = load_file(folder / "own" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == plan.parameters
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(
            clone(fresh), folder / "own", is_trainable=True, **options
        ).eval()
        assert same_tensors(tensors_of(loaded), tensors_of(model))
        assert torch.equal(run(loaded, x), expected)
        model.train()
        (loaded(x) ** 2).sum().backward()
        gradients = [its.grad for its in loaded.parameters() if its.requires_grad]
        assert all(grad is not None and bool(grad.any()) for grad in gradients)
        model.eval()
    tensors, config = lora_of(model)
    (folder / "lora").mkdir()
    save_file(tensors, folder / "lora" / "adapter_model.safetensors")
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config))
    lora = PeftModel.from_pretrained(clone(fresh), folder / "lora").eval()
    lora.train()  # no dropout here; in eval PEFT's LoRA is passed by in an encoder layer
    assert close(run(lora, x), expected)
    if merges:
        model.merge_adapter()
        assert close(run(model, x), expected, 1e-4)
        model.unmerge_adapter()
        assert close(run(model, x), expected, 1e-4)
        assert close(run(model.merge_and_unload(safe_merge=True), x), expected, 1e-4)


def clone(model: nn.Module) -> Any:
    return copy.deepcopy(model)


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


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


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


# nn.MultiheadAttention


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


def test_inside_a_multihead_attention_nothing_can_be_adapted() -> None:
    with pytest.raises(TargetError, match=r"nn.MultiheadAttention.*'layers.0.self_attn'"):
        wrapped(Attentive(), target_modules=["out_proj"])


def test_all_linear_leaves_the_inside_of_a_multihead_attention_alone() -> None:
    model = wrapped(Attentive(), target_modules="all-linear")
    assert {kind.name for kind in plan_of(model).kinds} == {"linear1", "linear2"}


# nn.Parameter


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


def test_a_mixed_batch_over_experts_is_refused() -> None:
    tiny = MODELS["mixtral"]
    model = get_peft_model(
        tiny.model(),
        msplora.MSPLoraConfig(target_modules=[], target_parameters=list(tiny.parameters)),
    ).eval()
    with pytest.raises(ValueError, match="mixed"):
        model(**tiny.batch(), adapter_names=["default", "__base__"])


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


def factors(model: Any) -> list[tuple[Tensor, Tensor, float]]:
    return list(msplora.factors(model).values())


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
