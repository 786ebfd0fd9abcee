"""Singular values of updates: those of the dense matrix, which nobody makes."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import msplora
from largest_tensor import NothingAsLargeAs
from msplora import MSPLoraConfig
from msplora.errors import MSPLoraError, UnsupportedError
from msplora.spectrum import singular_values_of
from oracle import ADAPTER, layer_of, levels_of, plan_of, randomise, root_of
from tiny import MODELS, llama


def random_pair(out: int, inner: int, rank: int, *batch: int, seed: int = 0) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*batch, rank, inner, generator=generator),
        torch.randn(*batch, out, rank, generator=generator),
    )


def dense(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.svdvals(b.double() @ a.double())


def assert_are_those_of(values: Tensor, a: Tensor, b: Tensor, rtol: float = 1e-10) -> None:
    """The values agree down to where float64 itself no longer says anything; the rest are zero."""
    expected = dense(a, b)
    kept = values.shape[-1]
    assert kept == min(*expected.shape[-1:], a.shape[-2])
    assert values.dtype == torch.float64
    noise = 1e-13 * float(a.double().norm() * b.double().norm())
    torch.testing.assert_close(values, expected[..., :kept], rtol=rtol, atol=noise)
    assert bool((expected[..., kept:] <= noise).all())
    assert bool((values.diff(dim=-1) <= 0).all())
    assert bool((values >= 0).all())


@pytest.mark.parametrize(("out", "inner", "rank"), [(60, 40, 7), (40, 60, 1), (50, 50, 14)])
def test_singular_values_are_those_of_the_dense_product(out: int, inner: int, rank: int) -> None:
    a, b = random_pair(out, inner, rank)
    assert_are_those_of(singular_values_of(a, b), a, b)


@pytest.mark.parametrize(("out", "inner", "rank"), [(6, 40, 20), (40, 6, 20), (5, 7, 30)])
def test_a_rank_above_the_sides_gives_as_many_as_the_shorter_side(
    out: int, inner: int, rank: int
) -> None:
    a, b = random_pair(out, inner, rank)
    values = singular_values_of(a, b)
    assert len(values) == min(out, inner)
    assert_are_those_of(values, a, b)


def test_rank_deficient_factors() -> None:
    a, b = random_pair(60, 40, 8)
    a[5:] = a[:3]  # three rows twice
    b[:, 0] = 0
    values = singular_values_of(a, b)
    assert_are_those_of(values, a, b)
    assert int((values > 1e-10).sum()) == 5


def test_a_new_adapter_has_none() -> None:
    a, _ = random_pair(60, 40, 8)
    assert torch.equal(singular_values_of(a, torch.zeros(60, 8)), torch.zeros(8).double())


def test_small_values_keep_their_digits_next_to_large_ones() -> None:
    """An update with known singular values from 1 down to 1e-9, its factors ill-conditioned."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(size, 10, generator=generator, dtype=torch.float64))[0]
        for size in (60, 40)
    )
    known = torch.logspace(0, -9, 10, dtype=torch.float64)
    values = singular_values_of(known[:, None] ** 0.5 * right.mT, left * known**0.5)
    torch.testing.assert_close(values, known, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_factors_of_any_precision_are_multiplied_exactly(dtype: torch.dtype) -> None:
    a, b = (factor.to(dtype) for factor in random_pair(60, 40, 7))
    assert_are_those_of(singular_values_of(a, b), a, b)


def test_leading_dimensions_are_a_batch() -> None:
    a, b = random_pair(30, 20, 4, 3)
    values = singular_values_of(a, b)
    assert values.shape == (3, 4)
    for expert in range(3):
        assert_are_those_of(values[expert], a[expert], b[expert])


def test_factors_that_do_not_fit_are_refused() -> None:
    a, b = random_pair(30, 20, 4)
    for wrong_a, wrong_b in ((b, a), (a[0], b), (a[None], b), (a[None], torch.stack([b, b]))):
        with pytest.raises(MSPLoraError, match="have no product B A"):
            singular_values_of(wrong_a, wrong_b)
    a[0, 0] = math.nan
    with pytest.raises(MSPLoraError, match="not finite"):
        singular_values_of(a, b)


def test_no_dense_matrix_is_made() -> None:
    a, b = random_pair(300, 200, 14)
    with NothingAsLargeAs(300 * 200) as watched:
        singular_values_of(a, b)
    assert watched.largest == 300 * 14
    with pytest.raises(AssertionError, match=r"made \(300, 200\)"), NothingAsLargeAs(300 * 200):
        torch.linalg.svdvals(b @ a)  # what it would look like


def test_a_model_is_gone_through_without_a_dense_matrix() -> None:
    config = MSPLoraConfig(target_modules=["down_proj"])
    model = get_peft_model(llama(hidden_size=64, intermediate_size=96), config)
    randomise(model)
    with NothingAsLargeAs(64 * 96):
        assert len(msplora.singular_values(model)) == 4


def adapted(name: str) -> tuple[Any, Any]:
    tiny = MODELS[name]
    config = MSPLoraConfig(
        target_modules=tiny.targets, target_parameters=list(tiny.parameters) or None
    )
    model = get_peft_model(tiny.model(), config)
    randomise(model)
    return model, tiny


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_site_of_a_model(name: str) -> None:
    """Against the sum of the levels, written out from the factors and the plan."""
    model, _ = adapted(name)
    plan = plan_of(model)
    found = msplora.singular_values(model)
    assert set(found) == {site.key for site in plan.sites}
    for site in plan.sites:
        levels = levels_of(model, site, plan)
        rank = sum(pair.rank for pair, *_ in levels)
        if site.shape.layout != "experts":
            a = torch.cat([a.double() for _, a, _, _ in levels])
            b = torch.cat([b.double() * scale for _, _, b, scale in levels], dim=1)
            assert len(a) == rank
            assert_are_those_of(found[site.key], a, b)
            continue
        experts = site.shape.blocks
        assert found[site.key].shape[0] == experts
        for expert in range(experts):
            delta = sum(
                scale * b.double()[:, expert::experts] @ a.double()[expert * r : (expert + 1) * r]
                for (_, a, b, scale), r in zip(levels, [p.rank for p, *_ in levels], strict=True)
            )
            assert isinstance(delta, Tensor)
            expected = torch.linalg.svdvals(delta)
            values = found[site.key][expert]
            torch.testing.assert_close(values, expected[: len(values)], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["llama-all-linear", "gpt2", "bert", "mixtral"])
def test_they_are_those_of_what_merging_adds(name: str) -> None:
    model, _ = adapted(name)
    found = msplora.singular_values(model)
    for site in plan_of(model).sites:
        layer = layer_of(root_of(model), site.key, experts=site.shape.layout == "experts")
        delta = layer.get_delta_weight(ADAPTER).detach().double()
        expected = torch.linalg.svdvals(delta)
        values = found[site.key]
        torch.testing.assert_close(
            values, expected[..., : values.shape[-1]], rtol=1e-4, atol=1e-6 * float(expected.max())
        )


@pytest.mark.parametrize("name", ["llama-all-linear", "gpt2"])
def test_plain_lora(name: str) -> None:
    tiny = MODELS[name]
    config = LoraConfig(r=3, lora_alpha=7, target_modules=tiny.targets, init_lora_weights=False)
    model: Any = get_peft_model(tiny.model(), config, adapter_name="other")
    found = msplora.singular_values(model, "other")
    assert set(found) == set(model.base_model.targeted_module_names)
    for key, values in found.items():
        layer = root_of(model).get_submodule(key)
        expected = torch.linalg.svdvals(layer.get_delta_weight("other").detach().double())
        torch.testing.assert_close(values, expected[:3], rtol=1e-5, atol=1e-7)


def test_a_pyramid_and_the_lora_that_it_is_have_the_same(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    from msplora.loading import write_json
    from msplora.plain_lora import lora_of

    model, tiny = adapted("llama-all-linear")
    tensors, config = lora_of(model)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    write_json(tmp_path / "adapter_config.json", config)
    lora = peft.PeftModel.from_pretrained(tiny.model(), str(tmp_path))
    found, expected = msplora.singular_values(model), msplora.singular_values(lora)
    assert found.keys() == expected.keys()
    for key, values in found.items():
        torch.testing.assert_close(values, expected[key], rtol=1e-5, atol=1e-6)


class Net(nn.Module):
    """Every other kind of weight that can be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.conv = nn.Conv2d(3, 10, 3)
        self.grouped = nn.Conv1d(4, 8, 3, groups=2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.attention(*[self.embedding(ids)] * 3)[0]


@pytest.mark.parametrize("config", [MSPLoraConfig, LoraConfig])
@pytest.mark.filterwarnings("ignore")
def test_embeddings_attention_and_convolutions(config: Any) -> None:
    targets = ["embedding", "attention", "conv", "grouped"]
    model: Any = get_peft_model(Net(), config(r=8, target_modules=targets, init_lora_weights=False))
    if config is MSPLoraConfig:
        randomise(model)
    found = msplora.singular_values(model)
    assert set(found) == {*targets, "attention.out_proj"}
    root = root_of(model)
    deltas = {
        "embedding": root.embedding.get_delta_weight(ADAPTER),
        "attention": root.attention.get_delta_weight(ADAPTER),
        "attention.out_proj": root.attention.base_layer.out_proj.get_delta_weight(ADAPTER),
        "conv": root.conv.get_delta_weight(ADAPTER).flatten(1),
        "grouped": operator_of(root.grouped),
    }
    for key, delta in deltas.items():
        expected = torch.linalg.svdvals(delta.detach().double())[: len(found[key])]
        atol = 1e-6 * float(expected[0])
        torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=atol)


def operator_of(layer: Any) -> Tensor:
    """The matrix by which a grouped convolution's adapter turns one patch into outputs."""
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    patches = torch.eye(a[0].numel()).reshape(-1, *a.shape[1:])
    outputs = F.conv1d(F.conv1d(patches, a), b, groups=layer.get_base_layer().groups)
    return outputs.flatten(1).t() * layer.scaling[ADAPTER]


def test_a_model_injected_without_peft_model() -> None:
    model: Any = peft.inject_adapter_in_model(
        MSPLoraConfig(target_modules=["q_proj"]), llama(), adapter_name="x"
    )
    assert all(not values.any() for values in msplora.singular_values(model, "x").values())


def test_what_has_no_singular_values_is_refused() -> None:
    model = get_peft_model(llama(), MSPLoraConfig(target_modules=["q_proj"]))
    with pytest.raises(MSPLoraError, match=r"'other': its adapters are \['default'\]"):
        msplora.singular_values(model, "other")
    with pytest.raises(MSPLoraError, match="has no adapter"):
        msplora.singular_values(llama())
    dora = get_peft_model(llama(), MSPLoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(UnsupportedError, match=r"q_proj' is not adding B A .* Dora"):
        msplora.singular_values(dora)
    adalora = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10)
    with pytest.raises(UnsupportedError, match="is not adding B A"):
        msplora.singular_values(get_peft_model(llama(), adalora))
    with torch.device("meta"):
        bare = llama()
    on_meta = get_peft_model(bare, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(MSPLoraError, match="meta device, without numbers"):
        msplora.singular_values(on_meta)
