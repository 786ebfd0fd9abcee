"""The traps that cost others, by their numbers in the list of traps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor

import msplora
from adapted_llama import BATCH, LLAMA, adapted, config, logits
from msplora.errors import (
    ConfigError,
    UnsupportedError,
)
from msplora.plain_lora import lora_of
from oracle import (
    assert_shared,
    plan_of,
    randomise,
    root_of,
    same_tensors,
    snapshot,
    tensors_of,
    trainable,
)
from tiny import MODELS

WEIGHTS = "adapter_model.safetensors"


def test_trap_1_a_shared_tensor_is_saved_once(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    plan = plan_of(adapted())
    assert sum(tensor.numel() for tensor in tensors.values()) == plan.parameters
    # Two tensors per pair, 8 bytes of length and a header are all there is.
    header = int.from_bytes((saved / WEIGHTS).read_bytes()[:8], "little")
    assert (saved / WEIGHTS).stat().st_size == 8 + header + 4 * plan.parameters
    assert len(tensors) == 2 * len(plan.pairs)


@pytest.mark.parametrize("road", ["add_adapter", "load_adapter", "inject"])
def test_trap_2_a_second_adapter_shares_within_itself(road: str, saved: Path) -> None:
    model: Any = adapted()
    if road == "add_adapter":
        model.add_adapter("second", config())
    elif road == "load_adapter":
        model.load_adapter(saved, "second", is_trainable=True)
    else:
        model = LLAMA.model()
        inject_adapter_in_model(config(), model, "default")
        inject_adapter_in_model(config(), model, "second")
    for name in ("default", "second"):
        assert_shared(model, plan_of(model, name), name)
    one, two = (
        {id(its) for pair in msplora.factors(model, name).values() for its in pair[:2]}
        for name in ("default", "second")
    )
    assert len(one) == len(two) == 2 * len(plan_of(model).pairs)
    assert not one & two


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_trap_3_a_half_precision_base_does_not_untie_pairs(
    autocast_adapter_dtype: bool, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    options = {"autocast_adapter_dtype": autocast_adapter_dtype}
    model: Any = get_peft_model(LLAMA.model(dtype=torch.bfloat16), config(), **options)
    assert_shared(model, plan_of(model))
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        LLAMA.model(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, **options
    )
    assert_shared(loaded, plan_of(loaded))
    assert same_tensors(tensors_of(loaded), tensors_of(model))
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))
    model.train()
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    assert all(a.grad is not None for a, _, _ in msplora.factors(model).values())


def test_trap_4_assembling_goes_through_the_owner_so_that_hooks_fire() -> None:
    """What offloading and sharding frameworks rely on: a module's `forward` gives the factor."""
    model = adapted()
    called: list[str] = []
    names = [name for name in dict(model.named_modules()) if name.endswith(".msplora_A.default")]
    for name in names:
        hook = lambda module, args, name=name: called.append(name)  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    logits(model)
    assert set(called) == set(names)
    sites_per_pair = sum(len(pair.sites) for pair in plan_of(model).pairs)
    assert len(called) == sites_per_pair


def test_trap_4_offloaded_factors_and_layers_compute_the_same() -> None:
    from accelerate import cpu_offload

    model = adapted()
    expected = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(iter(msplora.factors(model).values()))[0].device.type == "meta"
    assert torch.equal(logits(model), expected)


def test_trap_5_reentrant_checkpointing_accumulates_gradients_of_a_shared_pair() -> None:
    # What it does under DistributedDataParallel: tests/test_distributed.py.
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model.train()
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    assert all(bool(a.grad.any()) for a, _, _ in msplora.factors(model).values())


def test_trap_6_injecting_without_a_peft_model_trains_all_of_it() -> None:
    model: Any = inject_adapter_in_model(config(), LLAMA.model())
    names = [name for name, its in model.named_parameters() if its.requires_grad]
    assert len(names) == 2 * len(plan_of(model).pairs)
    assert trainable(model) == plan_of(model).parameters


def test_trap_6_adapter_names_and_target_parameters_work() -> None:
    model = adapted()
    with torch.no_grad():
        rows = model(**BATCH, adapter_names=["__base__", "default"]).logits
    assert torch.allclose(rows[1], logits(model)[1], atol=1e-5)
    assert not torch.allclose(rows[0], logits(model)[0], atol=1e-2)
    tiny = MODELS["gpt-oss"]
    parts = msplora.MSPLoraConfig(target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    plan = msplora.plan(tiny.model(), parts)
    assert {site.key.rpartition(".")[2] for site in plan.sites} == {"gate_up_proj"}


def test_trap_7_the_bases_output_is_not_written_to() -> None:
    model = adapted()
    layer = root_of(model).get_submodule("model.layers.0.self_attn.q_proj")
    seen: list[Tensor] = []
    layer.base_layer.register_forward_hook(
        lambda module, args, output: seen.extend([output, output.detach().clone()])
    )
    model(**BATCH)
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_trap_8_the_scale_is_applied_before_the_cast(dtype: torch.dtype) -> None:
    """Forward, merge and export see the same numbers, to the last bit."""
    model: Any = get_peft_model(
        LLAMA.model(dtype=dtype),
        config(alphas=[10.1, 3.3, 7.7]),  # scales that half precision cannot hold
        autocast_adapter_dtype=False,
    ).eval()
    randomise(model)
    layer = root_of(model).get_submodule("model.layers.1.self_attn.q_proj")
    pairs = plan_of(model).pairs_of["model.layers.1.self_attn.q_proj"]
    factors = msplora.factors(model)
    expected = torch.cat(
        [(factors[pair.address][1].float() * pair.scale).to(dtype) for pair in pairs], dim=1
    )
    assert torch.equal(layer.lora_B["default"].weight, expected)
    assert layer.scaling["default"] == 1.0
    assert torch.equal(
        layer.get_delta_weight("default"),
        (expected.float() @ layer.lora_A["default"].weight.float()).to(dtype),
    )
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    assert torch.equal(lora_of(model, dtype=dtype)[0][name], expected)


@pytest.mark.parametrize("name", ["msplora", "lora", "msplora_", "m", "ra_"])
def test_trap_9_a_name_inside_the_prefix_is_refused(name: str) -> None:
    base = LLAMA.model()
    before = snapshot(base)
    with pytest.raises(ConfigError, match="another name"):
        get_peft_model(base, config(), adapter_name=name)
    assert snapshot(base) == before
    model = adapted()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="another name"):
        model.add_adapter(name, config())
    assert snapshot(model) == before
    assert list(model.peft_config) == ["default"]


def test_trap_9_a_name_with_a_dot_is_refused() -> None:
    with pytest.raises(ConfigError, match="dot"):
        get_peft_model(LLAMA.model(), config(), adapter_name="v1.0")


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "loftq", "eva", "corda", "lora_ga", "mica"]
)
def test_trap_11_initialisations_that_rewrite_the_base_are_refused(init: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"{init}.*base weight.*gaussian"):
        config(init_lora_weights=init)


# Trap 10, files that do not fit: tests/test_adapter_files.py. Trap 12, a base whose encoder was
# partly missing, belongs to training: tests of `msplora train`.
