"""The tuner on every architecture: against oracles that know nothing of how it is built."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import msplora
from msplora.plain_lora import lora_of
from oracle import (
    Untied,
    assert_shared,
    plan_of,
    randomise,
    same_tensors,
    snapshot,
    tensors_of,
    term,
    trainable,
    watched,
)
from tiny import MODELS, Tiny

LAYERS = [1, 2, 3, 7, 12, 32]
RANKS = [5, 6, 7]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

every_model = pytest.mark.parametrize("name", MODELS)


def config_of(tiny: Tiny, **changes: Any) -> msplora.MSPLoraConfig:
    options = {"target_modules": tiny.targets, "target_parameters": list(tiny.parameters) or None}
    return msplora.MSPLoraConfig(**(options | changes))


def adapted(tiny: Tiny, *, random: bool = True, layers: int | None = None, **changes: Any) -> Any:
    model = get_peft_model(tiny.model(layers), config_of(tiny, **changes)).eval()
    if random:
        randomise(model)
    return model


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    found, expected = found.detach(), expected.detach()
    scale = max(1.0, float(expected.abs().max()))
    return bool((found - expected).abs().max() <= tolerance * scale)


# At the start


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_model
def test_at_the_start_adapted_is_base_exactly(name: str, dtype: torch.dtype) -> None:
    tiny = MODELS[name]
    base = tiny.model(dtype=dtype)
    batch = tiny.batch(dtype)
    before = logits(base, batch)
    model = get_peft_model(base, config_of(tiny)).eval()
    assert torch.equal(logits(model, batch), before)
    randomise(model)
    assert not torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_the_start_adapted_is_base_exactly_in_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    tiny = MODELS["llama"]
    base = tiny.model(dtype=dtype)
    before = logits(base, tiny.batch())
    model = get_peft_model(base, config_of(tiny), autocast_adapter_dtype=False).eval()
    assert {a.dtype for a, _, _ in msplora.factors(model).values()} == {dtype}
    assert torch.equal(logits(model, tiny.batch()), before)


# What every layer computes


def check_every_layer(model: Any, tiny: Tiny, tolerance: float = 1e-5) -> None:
    plan = plan_of(model)
    with watched(model, plan) as calls:
        model(**tiny.batch())
        assert {call.site.key for call in calls} == {
            site.key for site in plan.sites if site.shape.layout != "experts"
        }
        factors = msplora.factors(model)
        for call in calls:
            terms = {
                pair.level: term(call.site, call.base(), call.x, *factors[pair.address])
                for pair in plan.pairs_of[call.site.key]
            }
            assert len(terms) == len(plan.levels)
            assert all(float(its.abs().max()) > 0.01 for its in terms.values())
            assert close(call.change(), sum(terms.values(), torch.zeros(())), tolerance)


@every_model
def test_every_layer_adds_all_of_its_levels(name: str) -> None:
    check_every_layer(adapted(MODELS[name]), MODELS[name])


@pytest.mark.parametrize("layers", LAYERS)
def test_every_layer_adds_all_of_its_levels_at_any_depth(layers: int) -> None:
    model = adapted(MODELS["llama"], layers=layers)
    plan = plan_of(model)
    assert len(plan.sites) == 2 * layers
    check_every_layer(model, MODELS["llama"])


@pytest.mark.parametrize("r", RANKS)
def test_every_layer_adds_all_of_its_levels_at_odd_ranks(r: int) -> None:
    model = adapted(MODELS["llama"], r=r)
    assert [level.rank for level in plan_of(model).levels] == [r, r // 2, r // 4]
    check_every_layer(model, MODELS["llama"])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_every_layer_adds_all_of_its_levels_in_half_precision(
    dtype: torch.dtype, autocast_adapter_dtype: bool
) -> None:
    tiny = MODELS["llama"]
    model = get_peft_model(
        tiny.model(dtype=dtype), config_of(tiny), autocast_adapter_dtype=autocast_adapter_dtype
    ).eval()
    randomise(model)
    check_every_layer(model, tiny, tolerance=3e-2)


@every_model
def test_dropping_a_level_takes_away_just_its_term(name: str) -> None:
    tiny = MODELS[name]
    model = adapted(tiny)
    plan = plan_of(model)
    factors = msplora.factors(model)
    for level in plan.levels:
        kept = {address: b.detach().clone() for address, (_, b, _) in factors.items()}
        with watched(model, plan) as calls:
            for address, (_, b, _) in factors.items():
                if address.startswith(f"{level.name}/"):
                    b.zero_()
            model(**tiny.batch())
            without = {id(call.layer): call for call in calls}
            for address, (_, b, _) in factors.items():
                b.copy_(kept[address])
            for call in without.values():
                pair = next(its for its in plan.pairs_of[call.site.key] if its.level == level.name)
                lost = term(call.site, call.base(), call.x, *factors[pair.address])
                # The whole layer on the same input, less what it computed without the level.
                assert close(call.layer(call.x) - call.output, lost)
                assert float(lost.abs().max()) > 0.01


# Logits and gradients against an untied copy


def check_gradients(tiny: Tiny, layers: int | None = None, **changes: Any) -> None:
    model = adapted(tiny, layers=layers, **changes)
    untied = Untied(tiny.model(layers), model, plan_of(model))
    found, expected = model(**tiny.batch()).logits, untied(**tiny.batch()).logits
    assert close(found, expected)
    torch.manual_seed(5)
    cotangent = torch.randn_like(found)
    (found * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    factors = msplora.factors(model)
    gradients = untied.gradients()
    assert set(factors) == set(gradients)
    for address, (a, b, _) in factors.items():
        for parameter, gradient in zip((a, b), gradients[address], strict=True):
            assert parameter.grad is not None
            assert float(parameter.grad.abs().max()) > 0, address
            scale = max(1e-3, float(gradient.abs().max()))
            assert close(parameter.grad / scale, gradient / scale, 1e-3), address
    assert {name for name, its in model.named_parameters() if its.grad is not None} == {
        name for name, its in model.named_parameters() if its.requires_grad
    }


@every_model
def test_logits_and_gradients_are_those_of_an_untied_copy_summed(name: str) -> None:
    check_gradients(MODELS[name])


@pytest.mark.parametrize("layers", LAYERS[:-1])
def test_gradients_at_any_depth(layers: int) -> None:
    check_gradients(MODELS["llama"], layers)


@pytest.mark.parametrize(
    "changes", [{"r": 7}, {"use_rslora": True}, {"split_alpha": True}], ids=str
)
def test_gradients_of_other_pyramids(changes: dict[str, Any]) -> None:
    check_gradients(MODELS["llama"], 5, **changes)


def test_gradients_of_a_pyramid_of_five_levels() -> None:
    check_gradients(
        MODELS["llama"],
        7,
        ranks=[3, 1, 4, 2, 5],
        groups=[1, 2, 0, 5, 3],
        alphas=[1, 20, 3, 0.5, 8],
    )


# Counting


def numbers_by_formula(
    base: nn.Module, keys: list[str], ranks: list[int], groups: list[int]
) -> int:
    """Sum over kinds of (in + out) · Σ_t groups_t · r_t; name and shape tell kinds apart."""
    layers: dict[tuple[str, tuple[int, ...]], int] = {}
    for key in keys:
        kind = re.sub(r"\.\d+\.", ".#.", key, count=1)
        try:
            shape = tuple(base.get_parameter(key).shape)  # experts
        except AttributeError:
            shape = tuple(base.get_parameter(f"{key}.weight").shape)
        layers[kind, shape] = layers.get((kind, shape), 0) + 1
    total = 0
    for (_, shape), depth in layers.items():
        experts = shape[0] if len(shape) == 3 else 1
        levels = (
            rank * (min(count, depth) if count else depth)
            for rank, count in zip(ranks, groups, strict=True)
        )
        total += experts * sum(shape[-2:]) * sum(levels)
    return total


@every_model
@pytest.mark.parametrize("r", [8, 6, 5])
def test_planned_trainable_saved_and_computed_numbers_agree(
    name: str, r: int, tmp_path: Path
) -> None:
    tiny = MODELS[name]
    model = adapted(tiny, r=r)
    plan = plan_of(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    keys = [site.key for site in plan.sites]
    expected = numbers_by_formula(tiny.model(), keys, [r, r // 2, r // 4], [1, 3, 0])
    assert plan.parameters == expected
    assert trainable(model) == expected
    assert sum(tensor.numel() for tensor in saved.values()) == expected
    assert sum(plan.parameters_per_level.values()) == expected
    assert model.get_nb_trainable_parameters()[0] == expected


@pytest.mark.parametrize("layers", LAYERS)
def test_numbers_agree_at_any_depth(layers: int) -> None:
    model = adapted(MODELS["llama"], random=False, layers=layers)
    kinds = [(32, 32), (16, 32)]  # q and, with half the heads, v
    expected = sum(sum(shape) for shape in kinds) * (8 + 4 * min(3, layers) + 2 * layers)
    assert trainable(model) == plan_of(model).parameters == expected


# Merging and unloading


@every_model
def test_merged_is_adapted_and_unmerging_restores_the_base(name: str) -> None:
    tiny = MODELS[name]
    model = adapted(tiny)
    before = {key: its.clone() for key, its in tiny.model().state_dict().items()}
    expected = logits(model, tiny.batch())
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        assert close(logits(model, tiny.batch()), expected)
        model.unmerge_adapter()
        root = model.get_base_model()
        for key, value in root.state_dict().items():
            original = re.sub(r"\.base_layer\b", "", key)
            if original in before:
                assert torch.allclose(value, before[original], atol=1e-5), key
    assert close(logits(model, tiny.batch()), expected)


@every_model
@pytest.mark.parametrize("road", ["merge", "safe_merge", "unload"])
def test_the_model_comes_back_without_a_trace(name: str, road: str) -> None:
    tiny = MODELS[name]
    untouched = tiny.model()
    model = adapted(tiny)
    expected = logits(model, tiny.batch()) if road != "unload" else logits(untouched, tiny.batch())
    if road == "unload":
        plain = model.unload()
    else:
        plain = model.merge_and_unload(safe_merge=road == "safe_merge")
    assert close(logits(plain, tiny.batch()), expected, 0 if road == "unload" else 1e-5)
    was, now = snapshot(untouched), snapshot(plain)
    assert sorted(now["state"]) == sorted(was["state"])
    assert {path: kind for path, (_, kind) in now["modules"].items()} == {
        path: kind for path, (_, kind) in was["modules"].items()
    }
    assert now["training"] == was["training"]


# Saving and loading


@every_model
@pytest.mark.parametrize(
    "options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str
)
def test_reloaded_is_saved_bit_for_bit(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    tiny = MODELS[name]
    model = adapted(tiny)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.model(), tmp_path, **options).eval()
    assert same_tensors(tensors_of(loaded), tensors_of(model))
    assert torch.equal(logits(loaded, tiny.batch()), logits(model, tiny.batch()))
    assert_shared(loaded, plan_of(loaded))
    assert trainable(loaded) == (plan_of(model).parameters if "is_trainable" in options else 0)


@every_model
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reloaded_under_another_name(name: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    tiny = MODELS[name]
    if tiny.parameters and Version(peft.__version__) < Version("0.21"):
        pytest.skip("older releases of PEFT take one adapter on parameters only")
    model = adapted(tiny)
    model.save_pretrained(tmp_path)
    expected = logits(model, tiny.batch())
    saved = tensors_of(model)
    randomise(model, seed=9)
    model.load_adapter(tmp_path, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert same_tensors(tensors_of(model, "other"), saved)
    assert not same_tensors(tensors_of(model), saved)
    model.set_adapter("other")
    assert torch.equal(logits(model.eval(), tiny.batch()), expected)
    assert_shared(model, plan_of(model, "other"), "other")
    first = {id(its) for pair in msplora.factors(model).values() for its in pair[:2]}
    second = {id(its) for pair in msplora.factors(model, "other").values() for its in pair[:2]}
    assert not first & second


@every_model
def test_transformers_own_loader(name: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    model = adapted(tiny)
    model.save_pretrained(tmp_path)
    plain: Any = tiny.model()
    plain.load_adapter(str(tmp_path))
    assert same_tensors(tensors_of(plain), tensors_of(model))
    assert torch.equal(logits(plain.eval(), tiny.batch()), logits(model, tiny.batch()))


AUTO_CLASSES = {
    "llama": ("CausalLM", "CAUSAL_LM"),
    "gpt2": ("CausalLM", "CAUSAL_LM"),
    "mixtral": ("CausalLM", "CAUSAL_LM"),
    "bert": ("SequenceClassification", "SEQ_CLS"),
    "t5": ("Seq2SeqLM", "SEQ_2_SEQ_LM"),
}


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_auto_classes_load_from_the_adapters_folder(name: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    base: Any = tiny.model()
    base.save_pretrained(tmp_path / "base")
    auto_class, task_type = AUTO_CLASSES[name]
    model_class: Any = getattr(transformers, f"AutoModelFor{auto_class}")
    base = model_class.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config_of(tiny, task_type=task_type)).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, tiny.batch())
    peft_class: Any = getattr(peft, f"AutoPeftModelFor{auto_class}")
    through_peft = peft_class.from_pretrained(str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(through_peft, tiny.batch()), expected)
    through_transformers = model_class.from_pretrained(str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(through_transformers, tiny.batch()), expected)


# The plain LoRA it is


def as_lora(model: Any, folder: Path, **options: Any) -> Path:
    tensors, config = lora_of(model, **options)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@every_model
@pytest.mark.parametrize("pad_to", ["none", "pow2"])
def test_the_exported_lora_gives_the_same_logits(name: str, pad_to: str, tmp_path: Path) -> None:
    if name == "mixtral" and MODELS[name].parameters and peft.__version__.startswith("0.19."):
        pytest.skip("PEFT 0.19 converts a LoRA of Mixtral's experts for an older transformers")
    tiny = MODELS[name]
    model = adapted(tiny)
    folder = as_lora(model, tmp_path / "lora", pad_to=pad_to)
    lora = PeftModel.from_pretrained(tiny.model(), folder).eval()
    assert type(lora.peft_config["default"]) is peft.LoraConfig
    assert close(logits(lora, tiny.batch()), logits(model, tiny.batch()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "deberta"])
def test_the_exported_dora_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    model = adapted(tiny, use_dora=True)
    folder = as_lora(model, tmp_path / "lora")
    assert json.loads((folder / "adapter_config.json").read_text())["use_dora"] is True
    lora = PeftModel.from_pretrained(tiny.model(), folder).eval()
    assert close(logits(lora, tiny.batch()), logits(model, tiny.batch()))
