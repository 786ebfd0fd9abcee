"""The traps that cost others: the numbered list, and every kind of bad input to the core.

A refusal says what was asked and what to do, and leaves the model exactly as it was.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import msplora
from msplora import product
from msplora.convert import lora_of
from msplora.errors import (
    AdapterFileError,
    ConfigError,
    MSPLoraError,
    TargetError,
    UnsupportedError,
)
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
from tiny import MODELS, llama

LLAMA = MODELS["llama"]
BATCH = LLAMA.batch()
TARGETS = ["q_proj", "v_proj"]
WEIGHTS = "adapter_model.safetensors"


def config(**changes: Any) -> msplora.MSPLoraConfig:
    return msplora.MSPLoraConfig(**({"target_modules": TARGETS} | changes))


def adapted(base: Any = None, **changes: Any) -> Any:
    model = get_peft_model(LLAMA.model() if base is None else base, config(**changes)).eval()
    randomise(model)
    return model


def reversed_inject(model: Any, wanted: Any) -> Any:
    return inject_adapter_in_model(wanted, model)


def add_second(model: Any, wanted: Any) -> None:
    model.add_adapter("second", wanted)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter's folder."""
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# The numbered list


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
    tiny = MODELS["mixtral"]
    parts = msplora.MSPLoraConfig(target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    plan = msplora.plan(tiny.model(), parts)
    assert {site.key.rpartition(".")[2] for site in plan.sites} == {"gate_up_proj"}


@pytest.mark.parametrize("shape", [(7, 8), (2, 3, 8), (8,)])
def test_trap_7_adding_into_the_bases_output_gives_right_gradients(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    a = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def added(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return product.add_product(x @ weight.t(), x, a, b, 0.7)

    assert torch.autograd.gradcheck(added, (x, weight, a, b))
    base = x @ weight.t()
    kept = base.detach().clone()
    product.add_product(base, x, a, b)
    assert torch.equal(base, kept)


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
        config(alphas=[10, 3, 7]),
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


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def first_key(tensors: dict[str, Tensor]) -> str:
    return next(key for key in sorted(tensors) if "msplora_B" in key)


def missing(tensors: dict[str, Tensor]) -> None:
    del tensors[first_key(tensors)]


def left_over(tensors: dict[str, Tensor]) -> None:
    tensors[first_key(tensors).replace("q_proj", "x_proj")] = torch.zeros(2, 2)


def misshapen(tensors: dict[str, Tensor]) -> None:
    tensors[first_key(tensors)] = tensors[first_key(tensors)][:, :1].contiguous()


def transposed(tensors: dict[str, Tensor]) -> None:
    tensors[first_key(tensors)] = tensors[first_key(tensors)].t().contiguous()


def not_a_number(tensors: dict[str, Tensor]) -> None:
    tensors[first_key(tensors)][0, 0] = float("nan")


def infinite(tensors: dict[str, Tensor]) -> None:
    tensors[first_key(tensors)][0, 0] = float("inf")


def nothing(tensors: dict[str, Tensor]) -> None:
    tensors.clear()


def of_a_lora(tensors: dict[str, Tensor]) -> None:
    tensors.clear()
    for part in "AB":
        key = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"
        tensors[key] = torch.zeros(8, 32)


BROKEN = {
    missing: "is missing",
    left_over: "not one of this adapter's",
    misshapen: "has shape",
    transposed: "has shape",
    not_a_number: "not finite",
    infinite: "not finite",
    nothing: "is missing",
    of_a_lora: "is missing",
}


ROADS = ["peft", "low memory", "second", "second, low memory"]


def load(road: str, base: Any, folder: Path) -> None:
    """Load an adapter's folder onto `base`, which for the second adapter is adapted already."""
    if road == "transformers":
        base.load_adapter(str(folder))
    elif "second" in road:
        model = base if isinstance(base, PeftModel) else adapted(base)
        model.load_adapter(folder, "second", low_cpu_mem_usage="low" in road)
    else:
        PeftModel.from_pretrained(base, folder, low_cpu_mem_usage="low" in road)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    ("damage", "says"), BROKEN.items(), ids=lambda its: getattr(its, "__name__", "")
)
def test_trap_10_a_file_that_does_not_fit_is_an_error(
    damage: Any, says: str, road: str, saved: Path
) -> None:
    change_tensors(saved, damage)
    with pytest.raises(AdapterFileError, match=says) as caught:
        load(road, LLAMA.model(), saved)
    if damage in (missing, misshapen, not_a_number):
        assert "q_proj" in str(caught.value)  # the tensor is named


@pytest.mark.parametrize("damage", [missing, misshapen, nothing])
def test_trap_10_transformers_own_loader_reports_what_does_not_fit(
    damage: Any, saved: Path
) -> None:
    # It reads the file without PEFT and without us, and leaves the decision to its caller.
    change_tensors(saved, damage)
    model: Any = LLAMA.model()
    try:
        report = model.load_adapter(str(saved))
    except RuntimeError as error:
        assert "mismatch" in str(error)  # noqa: PT017
    else:
        assert any("q_proj" in key for key in report.missing_keys)


@pytest.mark.parametrize("road", [*ROADS, "transformers"])
def test_trap_10_a_file_that_is_cut_short_is_an_error(road: str, saved: Path) -> None:
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|safetensors|deserializ"):
        load(road, LLAMA.model(), saved)


def test_trap_10_a_failed_load_leaves_the_first_adapter_as_it_was(saved: Path) -> None:
    model = adapted()
    expected, before = logits(model), snapshot(model)
    whole = (saved / WEIGHTS).read_bytes()
    change_tensors(saved, missing)
    with pytest.raises(AdapterFileError):
        model.load_adapter(saved, "second")
    assert torch.equal(logits(model), expected)
    # PEFT has made room for "second" before it reads the file; deleting it leaves no trace.
    model.delete_adapter("second")
    assert snapshot(model) == before
    (saved / WEIGHTS).write_bytes(whole)
    model.load_adapter(saved, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model.eval()), expected)


def test_trap_10_loading_a_state_dict_checks_as_well() -> None:
    model = adapted()
    state_dict = peft.get_peft_model_state_dict(model)
    del state_dict[first_key(state_dict)]
    before = tensors_of(model)
    with pytest.raises(AdapterFileError, match="is missing"):
        peft.set_peft_model_state_dict(model, state_dict)
    assert same_tensors(tensors_of(model), before)


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "loftq", "eva", "corda", "lora_ga", "mica"]
)
def test_trap_11_initialisations_that_rewrite_the_base_are_refused(init: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"{init}.*base weight.*gaussian"):
        config(init_lora_weights=init)


# Trap 12, a base whose encoder was partly missing, belongs to training: tests of `msplora train`.


# What a pyramid does not do is refused


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_bias": True},
        {"layer_replication": [(0, 2), (1, 3)]},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1, 2]},
        {"loftq_config": {"loftq_bits": 4}},
        {"megatron_config": {"a": 1}},
        {"target_parameters": ["q_proj.weight"], "lora_dropout": 0.1},
        {"target_parameters": ["q_proj.weight"], "use_dora": True},
    ],
    ids=lambda its: "-".join(its),
)
def test_what_a_pyramid_cannot_do_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=list(changes)[-1]):
        config(**changes)


def test_no_field_of_loras_config_is_ignored() -> None:
    """Every field of PEFT's LoraConfig is passed on, refused, or known here to work."""
    from msplora.config import _REFUSED

    works = """
        task_type peft_type auto_mapping peft_version base_model_name_or_path revision r bias
        inference_mode target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out
        use_rslora modules_to_save init_lora_weights layers_to_transform layers_pattern
        rank_pattern alpha_pattern megatron_core trainable_token_indices runtime_config use_dora
        target_parameters ensure_weight_tying qalora_group_size
    """
    fields = set(LoraConfig.__dataclass_fields__)
    assert fields - set(works.split()) - set(_REFUSED) == set()


def test_a_mixed_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"(?i)msplora|compatible"):
        get_peft_model(LLAMA.model(), config(), mixed=True)


def test_loading_into_a_mixed_model_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"(?i)msplora|compatible"):
        PeftMixedModel.from_pretrained(LLAMA.model(), str(saved))


@pytest.mark.parametrize("wrap", [get_peft_model, reversed_inject], ids=["peft", "inject"])
def test_a_foreign_lora_on_the_model_is_refused(wrap: Any) -> None:
    base: Any = LLAMA.model()
    inject_adapter_in_model(LoraConfig(target_modules=["o_proj"]), base, "foreign")
    before = snapshot(base)
    with pytest.raises(UnsupportedError, match=r"o_proj.*another method"):
        wrap(base, config())
    assert snapshot(base) == before


def test_a_lora_on_top_is_refused() -> None:
    model = adapted()
    expected, before = logits(model), snapshot(model)
    with pytest.raises(ValueError, match="MSPLORA"):  # PEFT's own refusal
        model.add_adapter("second", LoraConfig(target_modules=TARGETS))
    assert snapshot(model) == before
    assert torch.equal(logits(model), expected)


def test_a_lora_injected_into_an_adapted_model_is_refused() -> None:
    base: Any = inject_adapter_in_model(config(), LLAMA.model()).eval()
    expected = logits(base)
    with pytest.raises(ValueError, match=r"MSPLoRA|lora"):
        inject_adapter_in_model(LoraConfig(target_modules=TARGETS), base, "second")
    assert torch.equal(logits(base), expected)


def test_injecting_from_a_state_dict_is_refused() -> None:
    state_dict = peft.get_peft_model_state_dict(adapted())
    with pytest.raises(UnsupportedError, match="config"):
        inject_adapter_in_model(config(), LLAMA.model(), state_dict=state_dict)


# Targets that match nothing


BAD_TARGETS = {
    "a target": ({"target_modules": ["q_prj", "v_proj"]}, r"'q_prj'.*Did you mean.*'q_proj'"),
    "a target of a BERT": ({"target_modules": ["query"]}, r"'query'"),
    "a regular expression": ({"target_modules": r".*\.q_prj"}, r"regular expression.*'"),
    "a layer": ({"layers_to_transform": [0, 9]}, r"\[9\].*'model.layers' has blocks 0 to 3"),
    "one layer": ({"layers_to_transform": 4}, r"\[4\].*0 to 3"),
    "a negative layer": ({"layers_to_transform": [-1]}, r"\[-1\]"),
    "a pattern of layers": (
        {"layers_to_transform": [0], "layers_pattern": "blocks"},
        r"'blocks'.*'model.layers'",
    ),
    "a module to leave out": ({"exclude_modules": ["k_prj"]}, r"'k_prj'.*'k_proj'"),
    "everything left out": ({"exclude_modules": ["q_proj", "v_proj"]}, r"exclude_modules"),
    "a rank pattern": ({"rank_pattern": {"k_proj": 4}}, r"rank_pattern.*'k_proj'"),
    "an alpha pattern": ({"alpha_pattern": {"k_proj": 4}}, r"alpha_pattern.*'k_proj'"),
    "a pattern for one layer of a kind": (
        {"rank_pattern": {"layers.0.self_attn.q_proj": 4}},
        r"share.*'q_proj'",
    ),
    "a parameter": ({"target_parameters": ["q_proj.wieght"]}, r"'q_proj.wieght'.*weight"),
    "a module to save": ({"modules_to_save": ["lm_haed"]}, r"'lm_haed'.*'lm_head'"),
    "a norm": ({"target_modules": ["input_layernorm"]}, r"input_layernorm.*LlamaRMSNorm"),
    "a block": ({"target_modules": ["self_attn"]}, r"self_attn.*Inside.*q_proj"),
    "a token": ({"trainable_token_indices": [3, 999]}, r"999.*0 to 63"),
}


@pytest.mark.parametrize("name", BAD_TARGETS)
@pytest.mark.parametrize("wrap", [get_peft_model, reversed_inject, add_second, msplora.plan])
def test_a_target_that_matches_nothing(name: str, wrap: Any) -> None:
    changes, says = BAD_TARGETS[name]
    model: Any = adapted() if wrap is add_second else LLAMA.model()
    expected, before = logits(model), snapshot(model)
    with pytest.raises(MSPLoraError, match=re.compile(says, re.DOTALL)):
        wrap(model, config(**changes))
    assert snapshot(model) == before
    assert torch.equal(logits(model), expected)
    # And the right config still works on the same model.
    wrap(model, config())


def test_no_targets_for_an_unknown_model() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(4, 4)

    with pytest.raises(TargetError, match=r"target_modules is not set.*'project'"):
        get_peft_model(Own(), msplora.MSPLoraConfig())


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["q_proj", "lm_head"]], ids=str)
def test_a_tied_embedding_or_head_is_refused(targets: list[str]) -> None:
    base = llama(2, tie_word_embeddings=True)
    before = snapshot(base)
    with pytest.raises(TargetError, match=r"ensure_weight_tying"):
        get_peft_model(base, config(target_modules=targets))
    assert snapshot(base) == before
    assert base.lm_head.weight is base.model.embed_tokens.weight


# The config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r": 3}, r"at least 4.*ranks="),
        ({"r": 1}, r"at least 4.*ranks="),
        ({"r": 0}, r"1 or more"),
        ({"r": -8}, r"1 or more"),
        ({"r": 8.0}, r"whole number"),
        ({"r": True}, r"whole number"),
        ({"ranks": [8, 4], "groups": [1, 3, 0]}, r"ranks has 2, groups has 3"),
        ({"ranks": [8, 4, 2], "alphas": [16]}, r"alphas has 1"),
        ({"ranks": [8, 4, 2], "levels": ["a", "b"]}, r"levels has 2"),
        ({"ranks": [8, 4]}, r"groups"),
        ({"ranks": []}, r"empty"),
        ({"ranks": [8, 0, 2]}, r"1 or more"),
        ({"ranks": [8, 4, 2], "r": 4}, r"r = 4"),
        ({"groups": [1, -3, 0]}, r"0 \(one pair per layer\) or more"),
        ({"groups": [1, 2.5, 0]}, r"whole number"),
        ({"levels": ["a", "a", "b"]}, r"own name"),
        ({"levels": ["A", "b", "c"]}, r"small letters"),
        ({"levels": ["a/b", "b", "c"]}, r"small letters"),
        ({"levels": ["a.b", "b", "c"]}, r"small letters"),
        ({"alphas": [16, float("nan"), 1]}, r"finite"),
        ({"alphas": [16, float("inf"), 1]}, r"finite"),
        ({"alphas": [16, 0, 1]}, r"above 0"),
        ({"lora_alpha": -1}, r"above 0"),
        ({"bias": "some"}, r"msplora_only"),
        ({"lora_dropout": 1.5}, r"lora_dropout.*0.*1"),
        ({"lora_dropout": -0.1}, r"lora_dropout.*0.*1"),
        ({"format_version": 99}, r"format_version 99"),
    ],
    ids=str,
)
def test_impossible_configs_are_refused_when_made(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.compile(says, re.DOTALL)):
        config(**changes)


def test_a_layers_pattern_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="layers_to_transform"):
        get_peft_model(LLAMA.model(), config(layers_pattern="blocks"))


# Another base


@pytest.mark.parametrize("road", [*ROADS, "transformers"])
def test_an_adapter_for_another_shape_is_refused(road: str, saved: Path) -> None:
    wider = llama(4, hidden_size=48, num_attention_heads=6)
    model: Any = adapted(wider) if "second" in road else wider
    before, adapters = snapshot(model), list(getattr(model, "peft_config", {}))
    with pytest.raises(AdapterFileError, match=r"another base.*hash"):
        load(road, model, saved)
    assert snapshot(model) == before
    assert list(getattr(model, "peft_config", {})) == adapters


def test_an_adapter_for_another_depth_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterFileError, match="another base"):
        PeftModel.from_pretrained(llama(5), saved)


def test_an_adapter_for_another_architecture_is_refused(saved: Path) -> None:
    with pytest.raises(MSPLoraError, match=r"'llama'.*'bert'"):
        PeftModel.from_pretrained(MODELS["bert"].model(), saved)


def test_another_path_of_the_same_base_only_warns(tmp_path: Path) -> None:
    for name in ("here", "there"):
        LLAMA.model().save_pretrained(tmp_path / name)
    from transformers import AutoModelForCausalLM

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / name)

    adapted(load("here")).save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"here.*there"):
        PeftModel.from_pretrained(load("there"), tmp_path / "adapter")


def test_a_config_of_a_newer_format_is_refused(saved: Path) -> None:
    path = saved / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format_version": 2}))
    with pytest.raises(MSPLoraError, match="format_version 2"):
        PeftModel.from_pretrained(LLAMA.model(), saved)


def test_a_config_that_was_edited_to_other_ranks_is_refused(saved: Path) -> None:
    path = saved / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"ranks": [8, 4, 1]}))
    with pytest.raises(AdapterFileError, match="has shape"):
        PeftModel.from_pretrained(LLAMA.model(), saved)


# An injection that fails half-way


@pytest.mark.parametrize("fails_at", [0, 3, 7])
@pytest.mark.parametrize("wrap", [get_peft_model, reversed_inject, add_second])
def test_a_failed_injection_leaves_the_model_as_it_was(
    fails_at: int, wrap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msplora.model import MSPLoraModel

    model: Any = adapted() if wrap is add_second else LLAMA.model()
    expected, before = logits(model), snapshot(model)
    lend = MSPLoraModel._lend
    count = 0

    def failing(self: Any, *args: Any) -> None:
        nonlocal count
        if count == fails_at:
            raise MemoryError("no memory left")
        count += 1
        lend(self, *args)

    wanted = config(target_modules=["q_proj", "o_proj"])
    with monkeypatch.context() as patched:
        patched.setattr(MSPLoraModel, "_lend", failing)
        with pytest.raises(MemoryError):
            wrap(model, wanted)
    assert snapshot(model) == before
    assert torch.equal(logits(model), expected)
    adapter_name = "second" if wrap is add_second else "default"
    again = wrap(model, wanted) or model
    assert_shared(again, plan_of(again, adapter_name), adapter_name)


# Registration


def test_it_works_after_only_importing_msplora(saved: Path) -> None:
    program = (
        "import sys, msplora\n"
        "assert 'torch' not in sys.modules and 'peft' not in sys.modules\n"
        "from peft import PeftConfig\n"
        f"config = PeftConfig.from_pretrained({str(saved)!r})\n"
        "print(type(config).__name__, config.ranks, config.peft_type.value)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "MSPLoraConfig [8, 4, 2] MSPLORA"
