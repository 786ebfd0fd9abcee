"""The benchmark of training steps: what each method trains, the clock, memory, files, the command.

Nothing here asserts on a time.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import msplora as msplora_package
from msplora.bench import fits, memory, methods, models, timing
from msplora.bench.branches import add_branches
from msplora.bench.points import Point, all_points, site_points
from msplora.bench.shapes import SHAPES, shape_named
from msplora.bench.stepping import make_step
from msplora.bench.terminal import share_of_overhead, time_table, verdict

ROBERTA = Point("tiny-roberta", 4, "all-linear", "float32", 2, 8)
LLAMA = Point("tiny-llama", 4, "qv", "float32", 2, 8)


@pytest.fixture(scope="module")
def base() -> Any:
    """A base whose frozen weights the tests share, as the methods do."""
    return models.build_base(ROBERTA)


@pytest.fixture(scope="module")
def decoder() -> Any:
    """A base without any dropout."""
    return models.build_base(LLAMA)


# shapes


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("roberta-base", 124_647_170),
        # The published counts, with a head of two classes in the place of the language model's.
        ("llama-3.2-1b", 1_235_814_400 + 2 * 2048),
        ("llama-3.2-3b", 3_212_749_824 + 2 * 3072),
        ("llama-2-7b", 6_738_415_616 - 32_000 * 4096 + 2 * 4096),
    ],
)
def test_a_shape_has_as_many_numbers_as_the_real_model(name: str, numbers: int) -> None:
    assert SHAPES[name].parameters() == numbers


@pytest.mark.parametrize("targets", ["qv", "all-linear"])
@pytest.mark.parametrize("name", ["tiny-roberta", "tiny-llama"])
def test_a_shape_s_sites_are_those_that_its_pattern_finds(name: str, targets: str) -> None:
    point = Point(name, 3, targets, "float32", 1, 4)
    model = models.build_base(point)
    config = msplora_package.MSPLoraConfig(r=8, target_modules=SHAPES[name].pattern(targets))
    plan = msplora_package.plan(model, config)
    found = [(site.shape.in_features, site.shape.out_features) for site in plan.sites]
    assert sorted(found) == sorted(3 * SHAPES[name].sites(targets))


# methods


def expected(name: str, point: Point) -> int:
    """What trains beside the head, by its formula."""
    sides = point.its_shape.sites(point.targets)
    both = point.layers * sum(inputs + outputs for inputs, outputs in sides)
    # One pair for all layers, one for each third, one for each layer.
    pyramid = sum(inputs + outputs for inputs, outputs in sides) * (8 + 3 * 4 + point.layers * 2)
    return {
        "floor": 0,
        "lora": 8 * both,
        "lora-again": 8 * both,
        "lora-equal-rank": 14 * both,
        "gralora": 8 * both,
        "vera": point.layers * sum(256 + outputs for _, outputs in sides),
        "branches": pyramid,
        "msplora": pyramid,
    }[name]


@pytest.mark.parametrize("name", [name for name in methods.METHODS if name != "full"])
def test_a_method_trains_what_it_says_and_shares_the_rest(name: str, base: Any) -> None:
    model = methods.build(name, base, ROBERTA)
    head = sum(its.numel() for its in models.head_of(base).parameters())
    step = make_step(name, base, ROBERTA)
    assert step.trainable == head + expected(name, ROBERTA)
    step()
    for parameter in models.head_of(model).parameters():
        assert parameter.requires_grad
        assert all(parameter is not its for its in base.parameters())
    shared = {its.data_ptr() for its in base.parameters() if not its.requires_grad}
    frozen = {its.data_ptr() for its in model.parameters() if not its.requires_grad}
    assert shared <= frozen
    assert model.training


def test_full_trains_every_number_in_copies(base: Any) -> None:
    step = make_step("full", base, ROBERTA)
    assert step.trainable == ROBERTA.its_shape.parameters(4)
    own = {its.data_ptr() for its in step.model.parameters()}
    assert own.isdisjoint(its.data_ptr() for its in base.parameters())


def test_a_step_changes_what_trains_and_nothing_else(base: Any) -> None:
    before = [its.clone() for its in base.parameters()]
    for name in ("floor", "lora", "branches", "msplora"):
        step = make_step(name, base, ROBERTA)
        old = [its.detach().clone() for its in step.parameters]
        step()
        moved = [not torch.equal(a, b) for a, b in zip(old, step.parameters, strict=True)]
        # A moves once B has.
        assert sum(moved) >= len(moved) // 2
        assert all(its.grad is None for its in step.parameters)
    assert all(torch.equal(a, b) for a, b in zip(before, base.parameters(), strict=True))


@pytest.mark.parametrize("targets", ["qv", "all-linear"])
def test_branches_are_the_pyramid_in_numbers(targets: str, decoder: Any) -> None:
    point = replace(LLAMA, targets=targets)
    ours = methods.build("msplora", decoder, point)
    other = models.shared_copy(decoder)
    factors = add_branches(other, point.its_shape.pattern(targets))
    real = msplora_package.factors(ours)
    assert factors.keys() == real.keys()
    with torch.no_grad():
        for address, (a, b, _) in real.items():
            b.normal_(std=0.3)
            factors[address][0].copy_(a)
            factors[address][1].copy_(b)
        ids, labels = models.batch_of(point)
        losses = [
            models.loss_of(model, model.get_input_embeddings()(ids), labels)
            for model in (ours, other, decoder)
        ]
    assert torch.allclose(losses[0], losses[1], atol=1e-6)
    assert not torch.allclose(losses[0], losses[2], atol=1e-3)


def test_checkpointing_changes_no_number(decoder: Any) -> None:
    losses = []
    for kind in ("none", "reentrant", "non-reentrant"):
        point = replace(LLAMA, checkpointing=kind)
        step = make_step("lora", decoder, point)
        losses.append([float(step()) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1])
    assert losses[0] == pytest.approx(losses[2])
    assert losses[0][2] < losses[0][0]


@pytest.mark.parametrize(
    ("dtype", "adapters"),
    [
        ("bfloat16", torch.float32),
        ("bfloat16-pure", torch.bfloat16),
        ("bfloat16-autocast", torch.float32),
    ],
)
def test_precisions(dtype: str, adapters: torch.dtype) -> None:
    point = replace(LLAMA, dtype=dtype, layers=1)
    base = models.build_base(point)
    for name in ("lora", "branches", "msplora"):
        step = make_step(name, base, point)
        assert torch.isfinite(step())
        head = list(models.head_of(step.model).parameters())
        others = [its for its in step.parameters if all(its is not one for one in head)]
        assert {its.dtype for its in others} == {adapters}
        assert {its.dtype for its in [*head, *base.parameters()]} == {torch.bfloat16}


def test_each_compiled_loss_has_a_code_of_its_own() -> None:
    """Torch keeps compiled code with the code object: one would try the others' guards first."""
    losses = [models.compiled_loss("lora", "eager") for _ in range(2)]
    codes = {id(its._torchdynamo_orig_callable.__code__) for its in losses}  # pyright: ignore
    assert len(codes) == 2


# the clock


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 9])
def test_methods_are_in_every_place_and_follow_every_other_equally_often(count: int) -> None:
    names = [f"method-{number}" for number in range(count)]
    rounds = count * (2 if count % 2 else 1)
    orders = [timing.order(names, number) for number in range(rounds)]
    assert all(sorted(its) == names for its in orders)
    places = Counter(pair for its in orders for pair in enumerate(its))
    assert len(places) == count**2
    assert len(set(places.values())) == 1
    follows = Counter(pair for its in orders for pair in pairwise(its))
    assert len(follows) == count * (count - 1)
    assert len(set(follows.values())) <= 1


def test_rounds_are_interleaved_and_warming_up_is_not_kept() -> None:
    now, log = 0.0, []

    def step(name: str, cost: float) -> None:
        nonlocal now
        log.append(name)
        now += cost

    ticks: list[int] = []
    found = timing.run_rounds(
        {"a": lambda: step("a", 1.0), "b": lambda: step("b", 3.0)},
        4,
        warmup=2,
        clock=lambda: now,
        on_step=lambda: ticks.append(len(log)),
    )
    assert found == {"a": [1.0] * 4, "b": [3.0] * 4}
    assert log == 3 * ["a", "b", "b", "a"]
    assert ticks == list(range(1, 13))
    lasts: list[float] = []
    timing.run_rounds(
        {"a": lambda: step("a", 1.0), "b": lambda: step("b", 3.0)},
        lambda last: lasts.append(last) or 1,
        warmup=1,
        clock=lambda: now,
    )
    assert lasts == [4.0]


def test_rounds_end_where_it_is_said() -> None:
    steps = dict.fromkeys(("a", "b"), lambda: None)
    asked: list[int] = []
    found = timing.run_rounds(steps, 9, go_on=lambda kept: asked.append(kept) or kept < 3)
    assert asked == [0, 1, 2, 3]
    assert [len(found[name]) for name in steps] == [3, 3]


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that is slow for one round changes the times, and no ratio."""
    slow = [1.0, 10.0, 1.0, 1.0]
    seconds = {
        "floor": [2.0 * its for its in slow],
        "lora": [3.0 * its for its in slow],
        "msplora": [3.3 * its for its in slow],
    }
    found = timing.figures(seconds, "msplora")
    assert found["to_floor"] == pytest.approx([1.65] * 3)
    assert found["to_lora"] == pytest.approx([1.1] * 3)
    assert found["seconds"][2] > 3.3
    assert timing.figures(seconds, "lora")["to_lora"] == [1.0] * 3


def test_quartiles() -> None:
    assert timing.quartiles([5, 1, 4, 2, 3]) == [2, 3, 4]
    assert timing.quartiles([1, 2]) == [1.25, 1.5, 1.75]
    assert timing.quartiles([7]) == [7, 7, 7]


def test_the_table_says_what_is_within_the_control() -> None:
    def row(method: str, to_floor: float, *to_lora: float) -> dict[str, Any]:
        return {
            "method": method,
            "rounds": 60,
            "seconds": [1, 1, 1],
            "to_floor": [to_floor] * 3,
            "to_lora": list(to_lora),
        }

    control = row("lora-again", 1.5, 0.97, 1.0, 1.04)
    assert verdict(row("msplora", 1.5, 0.9, 1.03, 1.2), control["to_lora"]) == "within A/A"
    assert verdict(row("msplora", 1.5, 1.0, 1.05, 1.2), control["to_lora"]) == "slower"
    assert verdict(row("msplora", 1.5, 0.9, 0.96, 1.2), control["to_lora"]) == "faster"
    assert share_of_overhead(1.25, 1.5) == 0.5
    assert share_of_overhead(1.25, 0.99) is None
    rows = [row("floor", 1, 0.6, 0.7, 0.8), row("lora", 1.5, 1, 1, 1), control]
    assert "0.970–1.040" in str(time_table(rows, "").caption)
    assert "No lora-again" in str(time_table(rows[:2], "").caption)
    rows[0]["rounds"] = 3
    assert "no claim" in str(time_table(rows, "").caption)


# memory


def test_memory_of_known_allocations_is_exact() -> None:
    def step() -> torch.Tensor:
        first = torch.empty(1_000_000, dtype=torch.uint8)
        second = torch.empty(500, 1000)  # 2 MB more: 3 MB at once
        del first
        third = torch.empty(100, dtype=torch.float64)  # less than was released
        view = second[10:]
        del second, third
        return view

    assert memory.peak_live_bytes(step) == 3_000_000
    kept = torch.empty(700_000, dtype=torch.uint8)  # alive before: not the step's
    assert memory.peak_live_bytes(kept.zero_) == 0
    assert memory.peak_live_bytes(kept.clone) == 700_000
    assert memory.highest([5, -3, 2, -4, 9, -9]) == 9
    assert memory.highest([]) == 0


def test_what_earlier_work_left_is_not_let_go_during_the_step() -> None:
    """The profiler knows the sizes of what was made under it before, and counts its release."""

    def leave() -> None:
        left: list[Any] = [torch.zeros(1_000_000)]
        left.append(left)  # a circle, which only the collector finds

    def step() -> None:
        gc.collect()
        torch.zeros(500_000)

    memory.peak_live_bytes(leave)
    assert memory.peak_live_bytes(step) == 2_000_000


def test_memory_of_a_known_step() -> None:
    """A layer, its loss's gradient and its weight's: what is alive at the end of backward."""
    weight = torch.zeros(64, 1024, requires_grad=True)
    x = torch.ones(16, 1024)

    def step() -> None:
        (x @ weight.t()).sum().backward()
        weight.grad = None

    gradient = 64 * 1024 * 4
    assert gradient < memory.peak_live_bytes(step) < 2.2 * gradient


def test_measuring_memory_changes_no_number(decoder: Any) -> None:
    plain, measured = (make_step("msplora", decoder, LLAMA) for _ in range(2))
    losses = [float(plain()) for _ in range(3)]
    found = [float(measured())]
    peaks = [memory.peak_live_bytes(lambda: found.append(float(measured()))) for _ in range(2)]
    assert found == losses
    assert peaks[0] == peaks[1] > 0
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters, measured.parameters, strict=True)
    )


def test_the_resident_set_is_this_process_s_own() -> None:
    """Not its parent's, which Linux passes on to `ru_maxrss`."""
    ballast = torch.ones(100_000_000)  # 400 MB
    assert memory.resident_bytes() > 400e6
    script = (
        "import ast, pathlib, sys\n"
        f"text = pathlib.Path({memory.__file__!r}).read_text()\n"
        "tree = ast.parse(text)\n"
        "wanted = [its for its in tree.body if getattr(its, 'name', '') == 'resident_bytes']\n"
        "names = {'Path': pathlib.Path, 'sys': sys}\n"
        "exec(compile(ast.Module(wanted, []), 'resident', 'exec'), names)\n"
        "print(names['resident_bytes']())\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert 0 < int(ended.stdout) < 100e6
    del ballast


# does it fit


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["tiny-roberta", "tiny-llama"])
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1}, {"checkpointing": "reentrant"}])
def test_the_estimate_is_near_what_is_measured(shape: str, changes: dict[str, Any]) -> None:
    point = Point(shape, 3, "all-linear", "float32", 4, 32, **changes)
    base = models.build_base(point)
    for name in ("floor", "branches"):
        step = make_step(name, base, point)
        step()
        ratio = fits.need_of(point, [name]).activations / memory.peak_live_bytes(step)
        assert 0.85 < ratio < 2.6, (name, ratio)


def test_what_a_container_keeps_of_files_is_free(tmp_path: Path) -> None:
    for name, content in (
        ("memory.max", "16000\n"),
        ("memory.current", "12000\n"),
        ("memory.stat", "anon 1000\ninactive_file 7000\nactive_file 3000\nfile 10500\n"),
    ):
        (tmp_path / name).write_text(content)
    assert fits._container_bytes(tmp_path) == 16_000 - 2_000
    (tmp_path / "memory.max").write_text("max\n")
    assert fits._container_bytes(tmp_path) is None


def test_a_deep_model_is_counted_without_being_built() -> None:
    shape = shape_named("tiny-llama")
    with torch.device("meta"):
        built = models.classifier_class(shape)(shape.config(5))
    assert shape.parameters(5) == sum(its.numel() for its in built.parameters())
    assert shape.parameters(10**9) > 10**12


def test_the_base_is_counted_once_and_full_copies_it() -> None:
    point = Point("roberta-base", 12, "qv", "bfloat16", 8, 128)
    weights = 2 * point.its_shape.parameters()
    assert fits.need_of(point, ["floor", "lora", "msplora"]).weights == weights
    with_full = fits.need_of(point, ["floor", "full"])
    assert with_full.weights == 2 * weights
    assert with_full.training == 3 * weights


# points and names


def test_points_are_the_cartesian_product() -> None:
    found = all_points(["tiny-roberta", "tiny-llama"], None, ["qv"], ["float32"], [1, 2, 1], [4, 8])
    assert len(found) == 2 * 2 * 2
    assert {its.layers for its in found} == {4}
    assert len(all_points(["tiny-llama"], [1, 2, 3], ["qv"], ["float32"], [1], [4])) == 3
    (site,) = site_points(["768x3072"], [1024], ["float32"])
    assert site.keys() == {"in": 768, "out": 3072, "tokens": 1024, "dtype": "float32"}
