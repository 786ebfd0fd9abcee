"""What PEFT and transformers offer around a LoRA works here, and the sharing survives it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn

import msplora
from msplora.convert import lora_of
from oracle import (
    Untied,
    assert_shared,
    layer_of,
    plan_of,
    randomise,
    root_of,
    same_tensors,
    tensors_of,
    trainable,
)
from tiny import MODELS, VOCABULARY, llama

LLAMA = MODELS["llama"]
BATCH = LLAMA.batch()
TARGETS = ["q_proj", "v_proj"]


def config(**changes: Any) -> msplora.MSPLoraConfig:
    return msplora.MSPLoraConfig(**({"target_modules": TARGETS} | changes))


def adapted(*, random: bool = True, base: Any = None, **changes: Any) -> Any:
    model = get_peft_model(LLAMA.model() if base is None else base, config(**changes)).eval()
    if random:
        randomise(model)
    return model


def logits(model: Any, batch: dict[str, Tensor] = BATCH, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, **options).logits


def base_logits() -> Tensor:
    return logits(LLAMA.model())


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def step(model: Any, batch: dict[str, Tensor] = BATCH, rate: float = 0.1) -> None:
    """One step of plain gradient descent."""
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
                parameter.grad = None
    model.eval()


# Several adapters


def two_adapters(**second: Any) -> Any:
    model = adapted()
    model.add_adapter("second", config(**second))
    randomise(model, "second", seed=11)
    return model


def delta_model(model: Any, weights: dict[str, float]) -> Any:
    """A plain copy of the base in whose weights the adapters' deltas are added, by the oracle."""
    plain: Any = LLAMA.model()
    untouched = LLAMA.model()
    for name, weight in weights.items():
        untied = Untied(untouched, model, plan_of(model, name), name)
        with torch.no_grad():
            for key, value in untied.weights.items():
                change = value - untouched.get_parameter(key)
                plain.get_parameter(key).add_(weight * change)
    return plain


def test_an_added_adapter_shares_within_itself_and_with_no_other() -> None:
    model = two_adapters(r=6, target_modules=["q_proj", "o_proj"])
    assert_shared(model, plan_of(model))
    assert_shared(model, plan_of(model, "second"), "second")
    names = ("default", "second")
    first, second = (
        {its.data_ptr() for pair in msplora.factors(model, name).values() for its in pair[:2]}
        for name in names
    )
    assert not first & second


def test_only_the_active_adapter_trains() -> None:
    model = two_adapters(r=6)
    for name, other in (("default", "second"), ("second", "default")):
        model.set_adapter(name)
        assert trainable(model) == plan_of(model, name).parameters
        before, untouched = tensors_of(model, name), tensors_of(model, other)
        step(model)
        assert not same_tensors(tensors_of(model, name), before)
        assert same_tensors(tensors_of(model, other), untouched)


def test_switching_adapters_switches_the_output() -> None:
    model = two_adapters()
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        assert close(logits(model), logits(delta_model(model, {name: 1.0})))


def test_two_active_adapters_add_their_deltas() -> None:
    model = two_adapters(r=5, target_modules=["v_proj", "o_proj"])
    model.base_model.set_adapter(["default", "second"])
    expected = logits(delta_model(model, {"default": 1.0, "second": 1.0}))
    assert close(logits(model), expected)
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    assert close(logits(merged), expected)


def test_deleting_an_adapter_leaves_nothing_of_it() -> None:
    model = two_adapters()
    alone = adapted()
    model.delete_adapter("second")
    assert sorted(model.state_dict()) == sorted(alone.state_dict())
    assert torch.equal(logits(model), logits(alone))
    with pytest.raises(msplora.MSPLoraError, match=r"no MSPLoRA adapter 'second'.*default"):
        msplora.factors(model, "second")
    model.add_adapter("second", config(r=6))
    assert plan_of(model, "second").levels[0].rank == 6


def test_deleting_the_only_adapter_restores_the_output_of_the_base() -> None:
    model = adapted()
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model), base_logits())
    assert not [name for name in model.state_dict() if "msplora_" in name]


def test_disabling_gives_the_base() -> None:
    model = adapted()
    expected = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits())
    assert torch.equal(logits(model), expected)


def test_a_mixed_batch_gives_each_row_its_own_adapter() -> None:
    model = two_adapters(r=6)
    rows = {"input_ids": torch.cat([BATCH["input_ids"]] * 2)[:3]}
    names = ["__base__", "second", "default"]
    mixed = logits(model, rows, adapter_names=names)
    with model.disable_adapter():
        assert close(mixed[0], logits(model, rows)[0])
    for row, name in ((1, "second"), (2, "default")):
        model.set_adapter(name)
        assert close(mixed[row], logits(model, rows)[row])


def test_a_mixed_batch_is_refused_in_training() -> None:
    model = two_adapters().train()
    with pytest.raises(ValueError, match="training mode"):
        model(**BATCH, adapter_names=["default", "second"])


def test_a_mixed_batch_with_an_unknown_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        adapted()(**BATCH, adapter_names=["default", "nonsense"])


@pytest.mark.parametrize("combination", ["cat", "linear"])
def test_a_weighted_adapter(combination: str) -> None:
    model = two_adapters(r=6 if combination == "cat" else 8)
    weights = {"default": 0.7, "second": -0.3}
    model.add_weighted_adapter(
        list(weights), list(weights.values()), "sum", combination_type=combination
    )
    model.set_adapter("sum")
    assert_shared(model, plan_of(model, "sum"), "sum")
    if combination == "cat":  # exact
        assert close(logits(model), logits(delta_model(model, weights)))
        return
    for address, (a, b, scale) in msplora.factors(model, "sum").items():
        parts = [msplora.factors(model, name)[address] for name in weights]
        roots = [
            abs(weight * part[2]) ** 0.5
            for part, weight in zip(parts, weights.values(), strict=True)
        ]
        signs = [1 if weight > 0 else -1 for weight in weights.values()]
        expected_a = sum(root * part[0] for root, part in zip(roots, parts, strict=True))
        expected_b = sum(
            s * root * part[1] for s, root, part in zip(signs, roots, parts, strict=True)
        )
        assert torch.allclose(scale * b @ a, expected_b @ expected_a, atol=1e-5)


def test_a_weighted_adapter_saves_and_reloads(tmp_path: Path) -> None:
    model = two_adapters(r=6)
    model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(LLAMA.model(), tmp_path / "sum").eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("combination", ["svd", "ties", "dare_linear", "magnitude_prune"])
def test_other_combinations_are_refused(combination: str) -> None:
    model = two_adapters()
    with pytest.raises(msplora.MSPLoraError, match=r"shared.*'linear' or 'cat'"):
        model.add_weighted_adapter(
            ["default", "second"], [1.0, 1.0], "sum", combination_type=combination
        )
    assert sorted(model.peft_config) == ["default", "second"]


# What is adapted


def sites(**changes: Any) -> list[str]:
    model = adapted(random=False, **changes)
    plan = plan_of(model)
    wrapped = [
        path
        for path, module in root_of(model).named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    ]
    assert sorted(wrapped) == sorted(site.key for site in plan.sites)
    return [re_layer(site.key) for site in plan.sites]


def re_layer(key: str) -> str:
    return key.removeprefix("model.layers.")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target_modules": ["k_proj"]}, [f"{n}.self_attn.k_proj" for n in range(4)]),
        (
            {"target_modules": r".*\.[02]\..*\.(q|o)_proj"},
            [f"{n}.self_attn.{p}_proj" for p in "oq" for n in (0, 2)],
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1, 3]},
            ["1.self_attn.q_proj", "3.self_attn.q_proj"],
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": 2}, ["2.self_attn.q_proj"]),
        (
            {
                "target_modules": ["q_proj"],
                "layers_to_transform": [0],
                "layers_pattern": "layers",
            },
            ["0.self_attn.q_proj"],
        ),
        (
            {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
            [f"{n}.self_attn.q_proj" for n in range(4)],
        ),
        (
            {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.[13]\..*"},
            ["0.self_attn.q_proj", "2.self_attn.q_proj"],
        ),
    ],
    ids=str,
)
def test_what_is_adapted(changes: dict[str, Any], expected: list[str]) -> None:
    assert sites(**changes) == expected


def test_all_linear_takes_no_head_and_no_embedding() -> None:
    found = sites(target_modules="all-linear")
    assert len(found) == 7 * 4
    assert not [key for key in found if "lm_head" in key or "embed" in key]


def test_the_default_targets_of_a_known_architecture() -> None:
    assert {key.rpartition(".")[2] for key in sites(target_modules=None)} == {"q_proj", "v_proj"}


def test_depth_counts_the_adapted_blocks() -> None:
    model = adapted(base=llama(9).eval(), layers_to_transform=[0, 4, 5, 8], groups=[1, 2, 0])
    plan = plan_of(model)
    mid = {pair.group: pair.blocks for pair in plan.pairs if pair.level == "mid"}
    assert mid == {0: (0, 4), 1: (5, 8)}
    assert "blocks [1, 2, 3, 6, 7] are not adapted" in str(plan)
    assert_shared(model, plan)


# Config options


def test_modules_to_save_train_are_saved_and_come_back(tmp_path: Path) -> None:
    tiny = MODELS["bert"]
    model: Any = get_peft_model(
        tiny.model(),
        msplora.MSPLoraConfig(target_modules=tiny.targets, modules_to_save=["classifier"]),
    )
    head = tiny.model().classifier
    head_numbers = sum(parameter.numel() for parameter in head.parameters())
    assert trainable(model) == plan_of(model).parameters + head_numbers
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == trainable(model)
    loaded = PeftModel.from_pretrained(tiny.model(), tmp_path).eval()
    expected = logits(model.eval(), tiny.batch())
    assert torch.equal(logits(loaded, tiny.batch()), expected)
    assert close(logits(loaded.merge_and_unload(), tiny.batch()), expected)


def test_trainable_token_indices(tmp_path: Path) -> None:
    model = adapted(trainable_token_indices=[3, 7])
    assert trainable(model) == plan_of(model).parameters + 2 * 32
    step(model, {"input_ids": torch.tensor([[3, 7, 9, 3]])})
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.model(), tmp_path).eval()
    batch = {"input_ids": torch.tensor([[3, 7, 9, 3]])}
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert not torch.equal(logits(loaded, batch), logits(LLAMA.model(), batch))


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_adapter_dtype(autocast_adapter_dtype: bool, dtype: torch.dtype) -> None:
    model: Any = get_peft_model(
        LLAMA.model(dtype=dtype), config(), autocast_adapter_dtype=autocast_adapter_dtype
    )
    expected = torch.float32 if autocast_adapter_dtype else dtype
    assert {a.dtype for a, _, _ in msplora.factors(model).values()} == {expected}
    assert {b.dtype for _, b, _ in msplora.factors(model).values()} == {expected}
    model.add_adapter("second", config(), autocast_adapter_dtype=autocast_adapter_dtype)
    assert {a.dtype for a, _, _ in msplora.factors(model, "second").values()} == {expected}
    assert_shared(model, plan_of(model))
    assert_shared(model, plan_of(model, "second"), "second")


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    model.print_trainable_parameters()
    assert f"trainable params: {plan_of(model).parameters:,} ||" in capsys.readouterr().out


def test_rslora_scales_by_the_root_of_each_rank() -> None:
    model = adapted(use_rslora=True)
    scales = {address.split("/")[0]: s for address, (_, _, s) in msplora.factors(model).items()}
    assert scales == pytest.approx(
        {"global": 16 / 8**0.5, "mid": 16 / 4**0.5, "local": 16 / 2**0.5}
    )


def test_dora_has_one_magnitude_per_site_and_starts_at_the_base(tmp_path: Path) -> None:
    model = adapted(random=False, use_dora=True)
    plan = plan_of(model)
    assert plan.magnitude_parameters == 4 * (32 + 16)
    assert trainable(model) == plan.parameters
    assert close(logits(model), base_logits())
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= 1.1
    # W = m (W0 + Σ s B A) / |W0 + Σ s B A|, rows
    untied = Untied(LLAMA.model(), model, plan)
    for site in plan.sites:
        weight = untied.weights[f"{site.key}.weight"].detach()
        magnitude = 1.1 * LLAMA.model().get_parameter(f"{site.key}.weight").norm(dim=1)
        untied.weights[f"{site.key}.weight"] = (magnitude / weight.norm(dim=1))[:, None] * weight
    expected = untied(**BATCH).logits.detach()
    assert close(logits(model), expected)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == plan.parameters
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(LLAMA.model(), tmp_path, **options).eval()
        assert torch.equal(logits(loaded), logits(model))
    native: Any = LLAMA.model()
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native.eval()), logits(model))
    assert close(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize(
    ("bias", "extra"), [("none", 0), ("all", 4 * 2 * 32 + 3), ("msplora_only", 4 * 2 * 32)]
)
def test_bias(bias: Any, extra: int, tmp_path: Path) -> None:
    tiny = MODELS["bert"]
    base = tiny.model()
    if bias == "all":
        extra = sum(its.numel() for name, its in base.named_parameters() if name.endswith("bias"))
    model: Any = get_peft_model(base, msplora.MSPLoraConfig(target_modules=tiny.targets, bias=bias))
    assert trainable(model) == plan_of(model).parameters + extra
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == trainable(model)
    loaded = PeftModel.from_pretrained(tiny.model(), tmp_path).eval()
    assert torch.equal(logits(loaded, tiny.batch()), logits(model.eval(), tiny.batch()))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_initialisations(init: Any) -> None:
    ranks = {"ranks": [8, 4, 2]}
    torch.manual_seed(0)
    model = adapted(random=False, init_lora_weights=init, **ranks)
    equal = close(logits(model), base_logits())
    assert equal is (init is not False)
    for a, b, _ in msplora.factors(model).values():
        assert bool(a.any())
        assert bool(b.any()) is (init not in (True, "gaussian"))
        assert bool(((b @ a).abs() < 1e-5).all()) is (init is not False)
    addresses = list(msplora.factors(model))
    same_shape = [address for address in addresses if address.startswith("local/")][:2]
    first, second = (msplora.factors(model)[address][0] for address in same_shape)
    assert not torch.equal(first, second)


def test_rank_and_alpha_patterns_of_a_kind() -> None:
    model = adapted(rank_pattern={"q_proj": 16}, alpha_pattern={r".*v_proj": 4})
    by_kind = {
        (pair.level, pair.kind.rpartition(".")[2]): (pair.rank, pair.scale)
        for pair in plan_of(model).pairs
    }
    assert by_kind["global", "q_proj"] == (16, 1.0)
    assert by_kind["local", "q_proj"] == (4, 4.0)
    assert by_kind["global", "v_proj"] == (8, 0.5)
    assert close(logits(model), Untied(LLAMA.model(), model, plan_of(model))(**BATCH).logits)


# Copies and casts


def roads() -> dict[str, Callable[[Any, Path], Any]]:
    def reload(model: Any, folder: Path, **options: Any) -> Any:
        model.save_pretrained(folder)
        return PeftModel.from_pretrained(LLAMA.model(), folder, is_trainable=True, **options)

    def state_dict(model: Any, folder: Path) -> Any:
        other = adapted()
        other.load_state_dict(model.state_dict())
        return other

    def whole(model: Any, folder: Path) -> Any:
        torch.save(model, folder / "model.pt")
        return torch.load(folder / "model.pt", weights_only=False)

    def again(model: Any, folder: Path) -> Any:
        kept = tensors_of(model)
        other = get_peft_model(model.unload(), config())
        with torch.no_grad():
            for address, (a, b, _) in msplora.factors(other).items():
                a.copy_(kept[address][0])
                b.copy_(kept[address][1])
        return other

    return {
        "deepcopy": lambda model, folder: copy.deepcopy(model),
        "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
        "torch.save": whole,
        "state_dict": state_dict,
        "reload": reload,
        "reload with low memory": lambda model, folder: reload(
            model, folder, low_cpu_mem_usage=True
        ),
        "unload and wrap again": again,
        "double and back": lambda model, folder: model.double().float(),
        "to device and dtype": lambda model, folder: model.to("cpu", torch.float64).float(),
    }


@pytest.mark.parametrize("road", roads())
def test_the_sharing_survives(road: str, tmp_path: Path) -> None:
    model = adapted()
    expected, kept = logits(model), tensors_of(model)
    other = roads()[road](model, tmp_path).eval()
    assert same_tensors(tensors_of(other), kept)
    assert_shared(other, plan_of(other))
    assert torch.equal(logits(other), expected)
    step(other)
    assert_shared(other, plan_of(other))
    assert close(logits(other), Untied(LLAMA.model(), other, plan_of(other))(**BATCH).logits)


def test_a_deep_copy_shares_nothing_with_the_original() -> None:
    model = adapted()
    expected = logits(model)
    other = copy.deepcopy(model)
    step(other)
    randomise(other, seed=12)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(other), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casting_the_model(dtype: torch.dtype) -> None:
    model = adapted().to(dtype)
    assert_shared(model, plan_of(model))
    assert {a.dtype for a, _, _ in msplora.factors(model).values()} == {dtype}
    step(model)
    assert_shared(model, plan_of(model))


def test_the_state_dict_lists_every_number_once() -> None:
    model = adapted()
    adapter = {key: its for key, its in model.state_dict().items() if "msplora_" in key}
    assert sum(tensor.numel() for tensor in adapter.values()) == plan_of(model).parameters
    assert len({tensor.data_ptr() for tensor in adapter.values()}) == len(adapter)
    # `get_parameter` finds them by the names the state dict shows.
    assert all(torch.equal(model.get_parameter(key), its) for key, its in adapter.items())


# Training


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant: bool) -> None:
    plain, checkpointed = adapted(), adapted()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        model.train()
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    expected = msplora.factors(plain)
    for address, (a, b, _) in msplora.factors(checkpointed).items():
        assert close(a.grad, expected[address][0].grad)
        assert close(b.grad, expected[address][1].grad)


def compiled_agrees(backend: str) -> None:
    torch._dynamo.reset()
    model = adapted()
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert close(compiled(**BATCH, use_cache=False).logits, expected)
    loss = compiled(**BATCH, use_cache=False).logits.pow(2).mean()
    loss.backward()
    gradients = {key: a.grad.clone() for key, (a, _, _) in msplora.factors(model).items()}
    model.zero_grad()
    model(**BATCH).logits.pow(2).mean().backward()
    for address, (a, _, _) in msplora.factors(model).items():
        assert close(gradients[address], a.grad, 1e-4)


def test_torch_compile_without_graph_breaks() -> None:
    compiled_agrees("eager")


@pytest.mark.slow
def test_torch_compile_with_inductor() -> None:
    compiled_agrees("inductor")


def test_dropout_acts_in_training_only() -> None:
    model = adapted(lora_dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_loraplus_puts_every_b_into_the_fast_group() -> None:
    from peft.optimizers import create_loraplus_optimizer

    model = adapted(random=False)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.0
    )
    rate = {id(its): group["lr"] for group in optimizer.param_groups for its in group["params"]}
    for a, b, _ in msplora.factors(model).values():
        assert (rate[id(a)], rate[id(b)]) == pytest.approx((1e-3, 16e-3))
    assert len(rate) == 2 * len(msplora.factors(model))


# PEFT's helpers


def test_rescale_adapter_scale() -> None:
    from peft.helpers import rescale_adapter_scale

    model = adapted()
    expected = logits(model)
    with rescale_adapter_scale(model, 0.5):
        assert close(logits(model), logits(delta_model(model, {"default": 0.5})))
    assert torch.equal(logits(model), expected)
    with rescale_adapter_scale(model, 0.0):
        assert close(logits(model), base_logits())


def test_disable_input_dtype_casting() -> None:
    from peft.helpers import disable_input_dtype_casting

    model: Any = get_peft_model(LLAMA.model(dtype=torch.bfloat16), config()).eval()
    randomise(model)
    expected = logits(model)
    with disable_input_dtype_casting(model), torch.autocast("cpu", torch.bfloat16):
        found = logits(model)
    assert close(found.float(), expected.float(), 0.2)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match=r"dtype|type"):
        logits(model)


def test_layer_and_model_status() -> None:
    model = two_adapters()
    status = model.get_model_status()
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.peft_types == {"default": "MSPLORA", "second": "MSPLORA"}
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.available_adapters == ["default", "second"]
    assert status.trainable_params == plan_of(model).parameters
    assert status.requires_grad == {"default": True, "second": False}
    layers = model.get_layer_status()
    assert len(layers) == 8
    assert all(layer.available_adapters == ["default", "second"] for layer in layers)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


def test_peft_converts_it_to_a_lora() -> None:
    model = adapted()
    rank = sum(level.rank for level in plan_of(model).levels)
    lora_config, state_dict = peft.convert_to_lora(model, rank, progressbar=False)
    lora: Any = get_peft_model(LLAMA.model(), lora_config).eval()
    peft.set_peft_model_state_dict(lora, state_dict)
    assert close(logits(lora), logits(model), 1e-4)


def test_the_config_is_a_lora_config_to_others() -> None:
    assert isinstance(config(), peft.LoraConfig)
    assert adapted(random=False).peft_type.value == "MSPLORA"


# Without a PeftModel


def test_inject_adapter_in_model(tmp_path: Path) -> None:
    model: Any = inject_adapter_in_model(config(), LLAMA.model()).eval()
    assert torch.equal(logits(model), base_logits())
    randomise(model)
    plan = plan_of(model)
    assert trainable(model) == plan.parameters
    assert_shared(model, plan)
    assert close(logits(model), Untied(LLAMA.model(), model, plan)(**BATCH).logits)
    state_dict = peft.get_peft_model_state_dict(model)
    assert sum(tensor.numel() for tensor in state_dict.values()) == plan.parameters
    other: Any = inject_adapter_in_model(config(), LLAMA.model()).eval()
    outcome = peft.set_peft_model_state_dict(other, state_dict)
    assert not [key for key in outcome.missing_keys if "msplora" in key]
    assert not outcome.unexpected_keys
    assert torch.equal(logits(other), logits(model))


def test_transformers_adapter_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Some releases of transformers ask here for a PEFT that is newer than the installed one.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model: Any = LLAMA.model()
    model.add_adapter(config(), "one")
    model.add_adapter(config(r=6), "two")
    randomise(model, "one")
    randomise(model, "two", seed=8)
    outputs = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        outputs[name] = logits(model.eval())
        assert_shared(model, plan_of(model, name), name)
    model.disable_adapters()
    assert torch.equal(logits(model), base_logits())
    model.enable_adapters()
    assert torch.equal(logits(model), outputs["two"])
    model.save_pretrained(tmp_path)
    model.delete_adapter("two")
    model.set_adapter("one")
    assert torch.equal(logits(model), outputs["one"])
    assert not [key for key in model.state_dict() if ".two." in key]
    loaded: Any = LLAMA.model()
    loaded.load_adapter(str(tmp_path), "three")
    assert torch.equal(logits(loaded.eval()), outputs["two"])


# Tied weights


def tied() -> Any:
    torch.manual_seed(0)
    return llama(4, tie_word_embeddings=True).eval()


def test_a_tied_head_borrows_the_pairs_of_the_embedding(tmp_path: Path) -> None:
    base = tied()
    before = logits(base)
    model = get_peft_model(
        base,
        config(target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True),
    ).eval()
    assert close(logits(model), before)
    randomise(model)
    plan = plan_of(model)
    assert trainable(model) == plan.parameters
    assert [site.key for site in plan.sites if "head" in site.key] == []
    expected = logits(model)
    weight = base.model.embed_tokens.base_layer.weight.detach().clone()
    for pair in plan.pairs_of["model.embed_tokens"]:
        a, b, scale = msplora.factors(model)[pair.address]
        weight += (scale * b @ a).t().detach()
    head = layer_of(root_of(model), "lm_head")
    x = torch.randn(3, 32)
    assert close(head(x), x @ weight.t(), 1e-4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tied(), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    model.merge_adapter()  # both layers, the one weight once
    assert close(logits(model), expected, 1e-4)
    model.unmerge_adapter()
    assert close(logits(model), expected, 1e-4)
    tensors, lora_config = lora_of(model)
    lora: Any = get_peft_model(tied(), peft.LoraConfig(**lora_config)).eval()
    peft.set_peft_model_state_dict(lora, tensors)
    assert close(logits(lora), expected, 1e-4)
    merged = model.merge_and_unload(safe_merge=True)
    assert close(logits(merged), expected, 1e-4)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_a_tied_head_with_dora_is_refused() -> None:
    with pytest.raises(msplora.MSPLoraError, match="use_dora"):
        get_peft_model(
            tied(),
            config(
                target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True, use_dora=True
            ),
        )


# Trainers


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, VOCABULARY, (16, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.slow
def test_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def trainer(model: Any, steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            save_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        return Trainer(model=model, args=arguments, train_dataset=rows())

    torch.manual_seed(0)
    straight = adapted(random=False)
    trainer(straight, 6).train()
    assert not close(logits(straight.eval()), base_logits(), 1e-3)
    torch.manual_seed(1)
    resumed = adapted(random=False)
    trainer(resumed, 6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_tensors(tensors_of(resumed), tensors_of(straight))
    loaded = PeftModel.from_pretrained(LLAMA.model(), tmp_path / "checkpoint-6").eval()
    assert torch.equal(logits(loaded), logits(straight.eval()))


@pytest.mark.slow
def test_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl (the train extra) is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets (the train extra) is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>"] + [f"w{place}" for place in range(VOCABULARY - 3)]
    inner = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    data = datasets.Dataset.from_list([{"text": f"w{n} w{n + 1} w{n + 2}"} for n in range(12)])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.SFTTrainer(
        model=LLAMA.model(),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=config(task_type="CAUSAL_LM"),
    )
    plan = plan_of(trainer.model)
    assert trainable(trainer.model) == plan.parameters
    trainer.train()
    assert_shared(trainer.model, plan)
    assert all(bool(b.any()) for _, b, _ in msplora.factors(trainer.model).values())
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(LLAMA.model(), tmp_path / "saved").eval()
    assert torch.equal(logits(loaded), logits(trainer.model.eval()))


def test_nothing_warns_on_the_common_road(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = adapted()
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(LLAMA.model(), tmp_path)
        model.load_adapter(tmp_path, "other")
        model.delete_adapter("other")
        model.merge_and_unload()


def test_an_adapter_in_a_module_of_its_own() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = LLAMA.model()

        def forward(self, input_ids: Tensor) -> Any:
            return self.inner(input_ids=input_ids)

    model = get_peft_model(Around(), config()).eval()
    randomise(model)
    assert_shared(model, plan_of(model))
    expected = Untied(Around().eval(), model, plan_of(model))(**BATCH).logits
    assert close(logits(model), expected)
