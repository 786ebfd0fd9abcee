"""An adapter's file that does not fit is an error that lists what is wrong (trap 10)."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import msplora
from adapted_llama import LLAMA, adapted, config, logits
from msplora.errors import (
    AdapterFileError,
    MSPLoraError,
)
from oracle import (
    plan_of,
    same_tensors,
    snapshot,
    tensors_of,
)
from tiny import MODELS, llama

WEIGHTS = "adapter_model.safetensors"


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
    # It reads the file without PEFT and without us, and leaves the decision to its caller. Before
    # transformers 5 it loaded through PEFT.
    change_tensors(saved, damage)
    model: Any = LLAMA.model()
    try:
        report = model.load_adapter(str(saved))
    except AdapterFileError:
        pass
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


# Every road reads the same numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_road_gives_the_same_logits_whatever_the_base(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = adapted(LLAMA.model(dtype=dtype))
    model.save_pretrained(tmp_path)
    expected = logits(model)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(LLAMA.model(dtype=dtype), tmp_path, **options)
        assert torch.equal(logits(loaded.eval()), expected), options
    plain: Any = LLAMA.model(dtype=dtype)
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain.eval()), expected)


@pytest.mark.parametrize("saved_in", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_low_memory_loads_into_the_same_dtype(
    saved_in: torch.dtype, autocast_adapter_dtype: bool, tmp_path: Path
) -> None:
    adapted().to(saved_in).save_pretrained(tmp_path)
    plain, low = (
        PeftModel.from_pretrained(
            LLAMA.model(dtype=torch.bfloat16),
            tmp_path,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        ).eval()
        for low_cpu_mem_usage in (False, True)
    )
    expected = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    for model in (plain, low):
        assert {its.dtype for a, b, _ in msplora.factors(model).values() for its in (a, b)} == {
            expected
        }
    assert torch.equal(logits(low), logits(plain))


def test_low_memory_keeps_the_dtype_where_peft_does_not_cast() -> None:
    state_dict = peft.get_peft_model_state_dict(adapted().to(torch.bfloat16))
    for low_cpu_mem_usage in (False, True):
        model: Any = inject_adapter_in_model(
            config(), LLAMA.model(), low_cpu_mem_usage=low_cpu_mem_usage
        )
        peft.set_peft_model_state_dict(model, dict(state_dict), low_cpu_mem_usage=low_cpu_mem_usage)
        assert {a.dtype for a, _, _ in msplora.factors(model).values()} == {torch.float32}


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


def test_names_of_levels_in_an_older_file_are_kept(tmp_path: Path) -> None:
    """Any three levels were called so, whatever their groups."""
    names = ["global", "mid", "local"]
    model = adapted(levels=names, ranks=[2, 4, 8], groups=[0, 3, 1])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.model(), tmp_path).eval()
    assert loaded.peft_config["default"].levels == names
    assert list(msplora.factors(loaded)) == list(msplora.factors(model))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "copied",
    [lambda its: its, copy.deepcopy, lambda its: pickle.loads(pickle.dumps(its))],
    ids=["itself", "deepcopy", "pickle"],
)
def test_a_used_config_is_replaced_for_another_adapter(copied: Any, saved: Path) -> None:
    first = config()
    get_peft_model(LLAMA.model(), first)
    of_file = PeftModel.from_pretrained(LLAMA.model(), saved).peft_config["default"]
    for used in (first, of_file):
        changes = {"target_modules": ["q_proj", "o_proj"], "inference_mode": False}
        replaced = dataclasses.replace(copied(used), **changes)
        model: Any = get_peft_model(LLAMA.model(), replaced)
        plan = plan_of(model)
        assert {site.key.rpartition(".")[2] for site in plan.sites} == {"q_proj", "o_proj"}
        assert replaced.fingerprint == plan.fingerprint != used.fingerprint
        fields = used.to_dict()
        assert {type(fields[name]) for name in ("model_type", "fingerprint")} == {str}
    other = dataclasses.replace(first, target_modules=["c_attn"])
    assert plan_of(get_peft_model(MODELS["gpt2"].model(), other)).sites


def test_a_config_that_was_read_and_replaced_is_still_for_its_base(saved: Path) -> None:
    read: Any = PeftConfig.from_pretrained(str(saved))
    replaced = dataclasses.replace(read, inference_mode=False)
    assert (replaced.model_type, replaced.fingerprint) == ("llama", read.fingerprint)
    with pytest.raises(AdapterFileError, match="another base"):
        get_peft_model(llama(5), replaced)


def test_an_adapter_that_was_trained_without_its_tasks_head_is_loaded(saved: Path) -> None:
    """A new one would be refused; this one's pairs are what they were."""
    file = saved / "adapter_config.json"
    head = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | head))
    loaded = PeftModel.from_pretrained(LLAMA.model(), saved).eval()
    assert torch.equal(logits(loaded), logits(adapted()))
