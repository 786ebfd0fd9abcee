"""What planning, injecting, merging, converting and saving cost: counted, never timed."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.profiler import ProfilerActivity, profile

import msplora
from msplora import MSPLoraConfig, from_lora
from msplora.inspection.adapter import _kinds
from msplora.inspection.entries import Entries, Entry, entries_of
from msplora.inspection.tensor_file import Header
from msplora.plain_lora import lora_of
from msplora.pyramid import Plan, Shape, Site, arrange
from msplora.store import STORE_NAME, A, B, _check_tensors, find_store, name_in_file
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


@pytest.mark.slow
def test_loading_grows_in_proportion_to_the_layers() -> None:
    config = MSPLoraConfig(target_modules="all-linear")
    loading(2, config)()
    # Python's functions only: torch itself holds every key against every child of a module.
    at_8, at_16, at_32 = (calls(loading(layers, config), ("call",)) for layers in (8, 16, 32))
    assert at_32 - at_16 <= 1.05 * 2 * (at_16 - at_8)


@pytest.mark.slow
def test_planning_many_names_grows_in_proportion_to_them() -> None:
    """A list of paths, one for each layer, as adapters trained elsewhere have it."""
    counts = [
        calls(planning(layers, MSPLoraConfig(target_modules=PATHS[:layers])))
        for layers in (4, 8, 16, 32)
    ]
    assert counts[3] - counts[2] <= 1.05 * 2 * (counts[2] - counts[1])


def grows_in_proportion(prepare: Callable[[int], Callable[[], Any]]) -> bool:
    """To what there is of something: two, four times as much of it takes as much more work."""
    prepare(2)()  # what happens once in a process
    at_8, at_16, at_32 = (calls(prepare(count)) for count in (8, 16, 32))
    return at_32 - at_16 <= 1.05 * 2 * (at_16 - at_8)


@pytest.mark.slow
def test_checking_what_is_loaded_grows_in_proportion_to_the_adapters() -> None:
    def checking(adapters: int) -> Callable[[], Any]:
        model: Any = get_peft_model(llama(1), MSPLoraConfig(target_modules=["q_proj"]))
        for number in range(adapters):
            model.add_adapter(f"number{number}", MSPLoraConfig(target_modules=["q_proj"]))
        store = find_store(model)
        assert store is not None
        tensors = store.state_dict()
        return lambda: _check_tensors(store, tensors, "")

    assert grows_in_proportion(checking)


class Kind(str):
    """A kind's name that is seen to be compared."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        return str.__hash__(self)


def kinds_of(count: int) -> Plan:
    """A plan of many kinds, each in three layers."""
    shape = Shape("linear", 4, 4)
    sites = [
        Site(f"layers.{block}.kind{number}", "layers", f"kind{number}", block, shape)
        for block in range(3)
        for number in range(count)
    ]
    return arrange(sites, MSPLoraConfig(target_modules=[]).pyramid)


@pytest.mark.slow
def test_inspecting_grows_in_proportion_to_the_kinds() -> None:
    def naming(count: int) -> Callable[[], Any]:
        shapes = {
            f"base_model.model.{STORE_NAME}.{name_in_file(pair.address, factor)}": (
                Header(Path(), shape, "F32")
            )
            for pair in kinds_of(count).pairs
            for factor, shape in ((A, (pair.rank, 4)), (B, (4, pair.rank)))
        }
        files: Any = SimpleNamespace(headers=shapes)
        config = MSPLoraConfig(target_modules=[])
        assert len(entries_of(files, config).pairs) == len(shapes) / 2
        return lambda: entries_of(files, config)

    def grouping(count: int) -> Callable[[], Any]:
        plan = kinds_of(count)
        names = {kind.name: Kind(kind.name) for kind in plan.kinds}
        levels = {level.name: level for level in plan.levels}
        header = Header(Path(), (4, 4), "F32")
        pairs = tuple(
            Entry(pair.address, names[pair.kind], levels[pair.level], (0,), 1, "a", "b")
            for pair in plan.pairs
        )
        files: Any = SimpleNamespace(headers={"a": header, "b": header})
        entries = Entries(pairs, plan.levels, (), frozenset())
        return lambda: _kinds(files, entries)

    assert grows_in_proportion(naming)
    assert grows_in_proportion(grouping)


@pytest.mark.slow
def test_fitting_grows_in_proportion_to_the_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        from_lora, "fit", lambda _, pairs: SimpleNamespace(pairs=pairs, history=[0], converged=True)
    )
    monkeypatch.setattr(from_lora, "laid_out", lambda pair, blocks: pair)

    def fitting(count: int) -> Callable[[], Any]:
        plan = kinds_of(count)
        names = {kind.name: Kind(kind.name) for kind in plan.kinds}
        plan = replace(
            plan,
            kinds=tuple(replace(kind, name=names[kind.name]) for kind in plan.kinds),
            pairs=tuple(replace(pair, kind=names[pair.kind]) for pair in plan.pairs),
        )
        updates = {site.key: [None] for site in plan.sites}
        return lambda: from_lora.fitted_pairs(plan, updates)  # pyright: ignore

    assert grows_in_proportion(fitting)


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
