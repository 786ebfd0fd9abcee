"""What planning, injecting, merging, converting and saving cost: counted, never timed."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.profiler import ProfilerActivity, profile

import msplora
from msplora import MSPLoraConfig
from msplora.plain_lora import lora_of
from oracle import randomise, trainable
from tiny import llama


def calls(work: Callable[[], Any], events: tuple[str, ...] = ("call", "c_call")) -> int:
    """How many functions `work` calls, Python's and C's, steps of generators included."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in events

    gc.collect()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def on_meta(layers: int) -> Any:
    with torch.device("meta"):
        return llama(layers)


def adapted(layers: int, targets: Any = "all-linear", **sizes: Any) -> Any:
    return get_peft_model(llama(layers, **sizes), MSPLoraConfig(target_modules=targets))


def planning(layers: int, config: MSPLoraConfig) -> Callable[[], Any]:
    model = on_meta(layers)
    return lambda: msplora.plan(model, config)


def injecting(layers: int, config: MSPLoraConfig) -> Callable[[], Any]:
    model = on_meta(layers)
    return lambda: get_peft_model(model, config)


def planning_a_second_adapter(layers: int, config: MSPLoraConfig) -> Callable[[], Any]:
    model = adapted(layers)
    return lambda: msplora.plan(model, config)


def saving(layers: int, config: MSPLoraConfig) -> Callable[[], Any]:
    model = get_peft_model(llama(layers), config)
    return lambda: get_peft_model_state_dict(model)


def loading(layers: int, config: MSPLoraConfig) -> Callable[[], Any]:
    model = get_peft_model(llama(layers), config)
    tensors = get_peft_model_state_dict(model)
    return lambda: set_peft_model_state_dict(model, tensors)


def merging(layers: int, config: MSPLoraConfig) -> Callable[[], Any]:
    model: Any = get_peft_model(llama(layers), config)
    return model.merge_and_unload


def converting(layers: int, config: MSPLoraConfig) -> Callable[[], Any]:
    model = get_peft_model(llama(layers), config)
    return lambda: lora_of(model)


def reading_singular_values(layers: int, config: MSPLoraConfig) -> Callable[[], Any]:
    model = get_peft_model(llama(layers), config)
    return lambda: msplora.singular_values(model)


PATHS = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(32)]


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize(
    "prepare",
    [
        planning,
        injecting,
        planning_a_second_adapter,
        saving,
        merging,
        converting,
        reading_singular_values,
    ],
)
def test_work_grows_in_proportion_to_the_layers(
    prepare: Callable[[int, MSPLoraConfig], Callable[[], Any]], targets: Any
) -> None:
    config = MSPLoraConfig(target_modules=targets)
    prepare(2, config)()  # what happens once in a process
    at_8, at_16, at_32 = (calls(prepare(layers, config)) for layers in (8, 16, 32))
    assert at_32 - at_16 <= 1.05 * 2 * (at_16 - at_8)


def test_loading_grows_in_proportion_to_the_layers() -> None:
    config = MSPLoraConfig(target_modules="all-linear")
    loading(2, config)()
    # Python's functions only: torch itself holds every key against every child of a module.
    at_8, at_16, at_32 = (calls(loading(layers, config), ("call",)) for layers in (8, 16, 32))
    assert at_32 - at_16 <= 1.05 * 2 * (at_16 - at_8)


def test_planning_many_names_grows_in_proportion_to_them() -> None:
    """A list of paths, one for each layer, as adapters trained elsewhere have it."""
    counts = [
        calls(planning(layers, MSPLoraConfig(target_modules=PATHS[:layers])))
        for layers in (4, 8, 16, 32)
    ]
    assert counts[3] - counts[2] <= 1.05 * 2 * (counts[2] - counts[1])


class Memory:
    """The bytes that torch's allocator gave while some work was done."""

    def __init__(self, work: Callable[[], Any], folder: Path) -> None:
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            self.result = work()
        file = folder / "trace.json"
        profiled.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
        memory = [its for its in events if its.get("name") == "[memory]"]
        memory.sort(key=lambda its: (its["ts"], its["args"]["Ev Idx"]))
        self.allocated = self.kept = self.peak = 0
        for its in memory:
            change = its["args"]["Bytes"]
            self.allocated += max(change, 0)
            self.kept += change
            self.peak = max(self.peak, self.kept)


WIDE = {"hidden_size": 256, "intermediate_size": 512}
LARGEST = 4 * 256 * 512
"""The bytes of the largest delta, in float32."""


def test_injecting_allocates_the_pairs_and_one_throw_away_rank_per_site(tmp_path: Path) -> None:
    model = llama(6, **WIDE)
    config = MSPLoraConfig(target_modules="all-linear")
    plan = msplora.plan(model, config)
    throw_away = [4 * kind.shape.parameters(1) * kind.layers for kind in plan.kinds]
    found = Memory(lambda: get_peft_model(model, config), tmp_path)
    pairs = 4 * trainable(found.result)
    assert pairs == 4 * plan.parameters
    assert pairs <= found.kept < 1.01 * pairs
    assert pairs < found.allocated <= 1.01 * (pairs + sum(throw_away))
    # What is thrown away is, layer by layer.
    one_site = 4 * max(kind.shape.parameters(1) for kind in plan.kinds)
    assert found.peak <= 1.01 * pairs + 2 * one_site


def test_planning_allocates_nothing(tmp_path: Path) -> None:
    model = llama(4, **WIDE)
    config = MSPLoraConfig(target_modules="all-linear")
    assert Memory(lambda: msplora.plan(model, config), tmp_path).allocated == 0
    assert Memory(lambda: msplora.plan(model.config, config), tmp_path).allocated < LARGEST / 100


@pytest.mark.slow
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_holds_the_delta_of_one_layer(tmp_path: Path, safe_merge: bool) -> None:
    def work(layers: int) -> int:
        # The model is made inside, so that the release of its old weights is seen.
        model: Any = adapted(layers, **WIDE)
        size = sum(its.untyped_storage().nbytes() for its in model.parameters())
        randomise(model)
        model.merge_and_unload(safe_merge=safe_merge)
        return size

    extra = []
    for layers in (3, 9):
        found = Memory(lambda its=layers: work(its), tmp_path)
        extra.append(found.peak - found.result)
    # B A and its multiple; merging safely, the old weight and the sum as well.
    assert max(extra) <= (4.1 if safe_merge else 2.1) * LARGEST
    assert extra[1] == pytest.approx(extra[0], rel=0.05)


def test_converting_holds_the_lora_and_one_site(tmp_path: Path) -> None:
    model = adapted(6, **WIDE)
    found = Memory(lambda: lora_of(model), tmp_path)
    tensors, _ = found.result
    lora = sum(its.untyped_storage().nbytes() for its in tensors.values())
    assert lora == sum(its.numel() * its.element_size() for its in tensors.values())
    one_site = 4 * 14 * (256 + 512)
    assert found.peak <= lora + 2 * one_site


def test_saving_copies_no_tensor(tmp_path: Path) -> None:
    model = adapted(6, **WIDE)
    found = Memory(lambda: model.save_pretrained(tmp_path / "adapter"), tmp_path)
    assert found.peak < 4 * trainable(model) / 100


def test_singular_values_hold_one_site(tmp_path: Path) -> None:
    peaks = []
    for layers in (3, 9):
        model = adapted(layers, **WIDE)
        randomise(model)
        peaks.append(Memory(lambda its=model: msplora.singular_values(its), tmp_path).peak)
    assert peaks[1] < 1.05 * peaks[0]


def test_the_merged_model_is_gone_before_it_is_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama().save_pretrained(tmp_path / "base")
    base: Any = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = MSPLoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(str(tmp_path / "adapter"))
    del base
    alive = []
    original: Any = hf.LlamaForCausalLM.from_pretrained

    def count(*args: Any, **kwargs: Any) -> nn.Module:
        alive.append(sum(isinstance(its, (hf.LlamaModel, PeftModel)) for its in gc.get_objects()))
        return original(*args, **kwargs)

    gc.collect()
    monkeypatch.setattr(hf.LlamaForCausalLM, "from_pretrained", count)
    msplora.to_merged(tmp_path / "adapter", tmp_path / "merged")
    assert alive == [0, 0]
