"""Stacks that layers share during a call of the model, against layers that stack by themselves."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import msplora
from msplora import layer, stacking
from msplora import model as tuner
from msplora.errors import MSPLoraError
from msplora.factor import Factor
from msplora.store import find_store
from oracle import randomise

WIDTH = 16
DEPTH = 5  # into 4 groups they go unevenly


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.mix(x))))


class Blocks(nn.Module):
    """Runs its blocks in the order of `path`, those in `frozen` without gradients."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.path: list[int] = list(range(depth))
        self.checkpointing: bool | None = None
        self.frozen: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        for place in self.path:
            block = self.layers[place]
            if self.checkpointing is not None:
                x = checkpoint(block, x, use_reentrant=self.checkpointing)  # pyright: ignore
            elif place in self.frozen:
                with torch.no_grad():
                    x = block(x)
            else:
                x = block(x)
        return x


def adapted(depth: int = DEPTH, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = msplora.MSPLoraConfig(target_modules=["up", "down", "mix"], **changes)
    model = get_peft_model(Blocks(depth).double(), config)
    model.double()
    randomise(model, size=0.1)
    return model.train()


class Headed(nn.Module):
    """A body that holds all adapted layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Blocks()
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def root_of(model: Any) -> Any:
    return model.base_model.model


def inputs(rows: int = 3) -> Tensor:
    return torch.randn(rows, WIDTH, dtype=torch.float64, generator=torch.manual_seed(1))


def gradients(model: Any, calls: int = 1) -> dict[str, Tensor | None]:
    model.zero_grad()
    torch.manual_seed(5)
    x = inputs().requires_grad_()
    sum(model(x).square().sum() for _ in range(calls)).backward()  # pyright: ignore
    found = {name: its.grad for name, its in model.named_parameters() if its.requires_grad}
    return {**found, "x": x.grad}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert {name for name, its in found.items() if its is None} == {
        name for name, its in expected.items() if its is None
    }
    for name, its in expected.items():
        torch.testing.assert_close(found[name], its, rtol=1e-11, atol=1e-12, msg=name)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each stacking served that was made."""
    counts: list[int] = []
    original = stacking.Layout.stack

    def counting(self: Any, *args: Any) -> Any:
        counts.append(len(self.row_of))
        return original(self, *args)

    monkeypatch.setattr(stacking.Layout, "stack", counting)
    return counts


def alone(model: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Tensor | None]:
    """The gradients where every layer stacks in passing."""
    with monkeypatch.context() as patch:
        patch.setattr(layer, "FEW_TOKENS", 0)
        return gradients(model, **options)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ranks": [8, 4, 2], "groups": [1, 4, 0]},
        {"ranks": [8, 4, 2], "groups": [1, 2, 0]},
        {"ranks": [4], "groups": [1], "levels": ["only"]},
        {"ranks": [2, 3, 1], "groups": [2, 3, 0], "alphas": [1.0, 7.3, 0.2]},
        {"rank_pattern": {"mix": 4}, "alpha_pattern": {"up": 3.0}},
        {"lora_dropout": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("depth", [1, 4, 5])
def test_the_gradients_are_those_of_layers_that_stack_alone(
    changes: dict[str, Any], depth: int, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(depth, **changes)
    found = gradients(model)
    assert sum(made) == 2 * 3 * depth
    assert_same(found, alone(model, monkeypatch))
    with torch.no_grad():
        stacked = model.eval()(inputs())
        monkeypatch.setattr(layer, "FEW_TOKENS", 0)
        torch.testing.assert_close(stacked, model(inputs()))


def test_all_layers_of_a_width_are_stacked_by_one_operation(made: list[int]) -> None:
    gradients(adapted())
    # A of up and mix, of down; B of down and mix, of up.
    assert sorted(made) == [DEPTH, DEPTH, 2 * DEPTH, 2 * DEPTH]


@pytest.mark.parametrize("frozen", ["global", "mid", "local", "msplora_A", "msplora_B", "mix"])
def test_frozen_factors_get_no_gradient(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    for name, its in model.named_parameters():
        if frozen in name:
            its.requires_grad_(False)
    found = gradients(model)
    assert found
    assert not any(frozen in name for name in found)
    assert_same(found, alone(model, monkeypatch))


@pytest.mark.parametrize("path", [[0, 1, 3], [4], [0, 0, 1, 1, 2, 0]], ids=str)
def test_layers_that_do_not_run_and_layers_that_run_again(
    path: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    root_of(model).path = path
    found = gradients(model)
    assert any(its is None for its in found.values())
    assert_same(found, alone(model, monkeypatch))


def test_a_part_without_gradients(made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    root_of(model).frozen = {0, 1, 3}
    found = gradients(model)
    assert len(made) == 8  # once with and once without gradients
    assert found["base_model.model.pyramid_store.local/3/up/pair.msplora_A.default.factor"] is None
    monkeypatch.setattr(root_of(model), "frozen", {0, 1, 2, 3})
    assert_same(gradients(model), alone(model, monkeypatch))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointed_blocks_give_the_same_gradients(
    use_reentrant: bool, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(lora_dropout=dropout)
    expected = gradients(model)
    root_of(model).checkpointing = use_reentrant
    assert_same(gradients(model), expected)
    assert_same(alone(model, monkeypatch), expected)


def test_two_calls_before_one_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    assert_same(gradients(model, calls=2), alone(model, monkeypatch, calls=2))


def test_second_derivatives_through_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    leaves = [its for its in model.parameters() if its.requires_grad]

    def second() -> list[Tensor]:
        x = inputs().requires_grad_()
        first = torch.autograd.grad(model(x).square().sum(), [x, *leaves], create_graph=True)
        its_norm = sum(its.square().sum() for its in first)
        return list(torch.autograd.grad(its_norm, [x, *leaves]))  # pyright: ignore

    found = second()
    monkeypatch.setattr(layer, "FEW_TOKENS", 0)
    torch.testing.assert_close(found, second())


# How long they live


def test_every_edit_between_calls_acts() -> None:
    model = adapted()
    x = inputs()
    factor, _, _ = msplora.factors(model)["global/0/mix"]
    before = model(x)
    factor.data.mul_(2)  # leaves no trace in the tensor's version
    changed = model(x)
    assert not torch.allclose(before, changed)
    one = root_of(model).layers[0].mix
    by_itself = one(x)
    factor.data.mul_(2)
    assert not torch.allclose(one(x), by_itself)
    factor.data.div_(4)
    assert torch.equal(model(x), before)


def test_they_go_with_the_call_and_its_graph() -> None:
    model = adapted()
    alive: list[Any] = []
    root_of(model).layers[2].mix.register_forward_hook(
        lambda module, args, output: alive.append(weakref.ref(its_call(model)))
    )
    model(inputs()).sum().backward()
    gc.collect()
    assert its_call(model) is None
    assert [its() for its in alive] == [None]


def its_call(model: Any) -> Any:
    store = find_store(model)
    assert store is not None
    return store.stacks._call


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model = adapted()
    with pytest.raises(RuntimeError):
        model(torch.randn(3, WIDTH + 1, dtype=torch.float64))
    root_of(model).path = [0, 99]
    with pytest.raises(IndexError):
        model(inputs())
    assert its_call(model) is None


def test_a_call_that_is_interrupted_leaves_nothing_behind() -> None:
    """Ctrl-C: torch's own hooks do not hear of it."""
    model = adapted()

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    hook = root_of(model).layers[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(inputs())
    hook.remove()
    assert its_call(model) is None


@pytest.mark.parametrize("path", [[0, 1, 2, 3, 4, 1], [0, 1, 2]], ids=str)
def test_a_layer_called_twice_or_not_at_all_has_its_gradient(
    path: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    root_of(model).path = path
    assert_same(gradients(model), alone(model, monkeypatch))


def test_a_graph_is_differentiated_again_and_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    leaves = [its for its in model.parameters() if its.requires_grad]
    x = inputs().requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(layer, "FEW_TOKENS", 0)
        expected = torch.autograd.grad(model(x).square().sum(), [x, *leaves])
    loss = model(x).square().sum()
    for wanted in ([x, *leaves], [x], leaves[:3], [x, *leaves]):
        found = torch.autograd.grad(loss, wanted, retain_graph=True)
        by_leaf = dict(zip([x, *leaves], expected, strict=True))
        for leaf, its in zip(wanted, found, strict=True):
            torch.testing.assert_close(its, by_leaf[leaf], rtol=1e-11, atol=1e-12)
    # What one backward gave is not written over by the next.
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [its.clone() for its in first]
    torch.autograd.grad(3 * loss, leaves)
    assert all(map(torch.equal, first, kept))


def test_factors_of_several_dtypes_each_get_their_gradient_unrounded() -> None:
    """A base of which a few layers stay in float32 has such pairs."""
    its = stacking.Stacking((2,), (1.0,), transposed=False)
    factors = [Factor(torch.randn(2, WIDTH, dtype=dtype)) for dtype in (torch.bfloat16, None)]
    for place, factor in enumerate(factors):
        its.join((place,), [factor])
    tensors = its.tensors_on(torch.device("cpu"))
    assert tensors is not None
    weights = torch.randn(2, 2, WIDTH)
    stacks = its(tensors, torch.float32)
    sum((its * w).sum() for its, w in zip(stacks, weights, strict=True)).backward()  # pyright: ignore
    assert torch.equal(factors[1].factor.grad, weights[1])  # pyright: ignore
    assert torch.equal(factors[0].factor.grad, weights[0].bfloat16())  # pyright: ignore


def test_layers_called_in_other_threads_stack_alone(made: list[int]) -> None:
    model = adapted().eval()
    root = root_of(model)
    x = inputs()
    expected = root.layers[0](x)
    found: list[Tensor] = []

    def in_between(*args: Any) -> None:
        made.clear()
        thread = threading.Thread(target=lambda: found.append(root.layers[0](x)))
        thread.start()
        thread.join()
        assert made == [1] * 6

    root.layers[1].register_forward_hook(in_between)
    model(x)
    assert torch.equal(found[0], expected)


def test_a_factor_that_somebody_hooked_into_is_asked_by_each_layer(
    made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    expected = gradients(model)
    store = find_store(model)
    assert store is not None
    fetched: list[int] = []
    hooked, _ = store.pair("global/0/mix", "default")
    hooked.register_forward_pre_hook(lambda *args: fetched.append(1))
    made.clear()
    assert_same(gradients(model), expected)
    # The A of mix and of up would be stacked together: there every layer stacks A and B alone.
    assert sorted(made) == [1] * 4 * DEPTH + [DEPTH, 2 * DEPTH]
    assert len(fetched) == DEPTH


def test_the_part_that_holds_all_adapted_layers_may_be_called_by_itself(made: list[int]) -> None:
    """As losses do that fold the logits: they call the decoder, and use the head in parts."""
    torch.manual_seed(0)
    config = msplora.MSPLoraConfig(target_modules=["up", "down", "mix"])
    model: Any = get_peft_model(Headed().double(), config).double()
    randomise(model, size=0.1)
    whole = model(inputs())
    by_the_whole = sorted(made)
    assert len(by_the_whole) < 6 * DEPTH
    made.clear()
    root = root_of(model)
    assert torch.equal(root.head(root.body(inputs())), whole)
    assert sorted(made) == by_the_whole
    assert its_call(model) is None
    # What it made is gone: an edit that leaves no trace is seen.
    next(iter(msplora.factors(model).values()))[1].data.mul_(2)
    assert not torch.allclose(root.head(root.body(inputs())), whole)
    made.clear()
    root.body.layers[0](inputs())
    assert made == [1] * 6
    assert hooks_of(root) == hooks_of(root.body) == 2
    assert hooks_of(model.unload().body) == 0


def test_a_block_by_itself_is_no_part_to_watch() -> None:
    """One that runs many times in a call, as ALBERT's does, would be stacked each time."""
    config = msplora.MSPLoraConfig(target_modules=r"layers\.1\.(up|mix)")
    model: Any = get_peft_model(Blocks(), config)
    assert hooks_of(root_of(model)) == 2
    assert hooks_of(root_of(model).layers[1]) == 0


def test_copies_and_pickles_stack_their_own() -> None:
    model = adapted()
    x = inputs()
    expected = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), expected)
        for a, _, _ in msplora.factors(copied).values():
            a.data.zero_()
        assert not torch.allclose(copied(x), expected)
        assert torch.equal(model(x), expected)
        store, its = find_store(model), find_store(copied)
        assert store is not None
        assert its is not None
        hooks = root_of(copied)._forward_pre_hooks.values()
        assert [hook.__self__ for hook in hooks] == [its.stacks]


def test_a_copy_made_during_a_call_is_in_none() -> None:
    model = adapted()
    copies: list[Any] = []
    store = find_store(model)
    assert store is not None
    stacks = store.stacks
    root_of(model).layers[1].register_forward_hook(
        lambda *args: copies.append((stacks._call, copy.copy(stacks)._call))
    )
    model(inputs())
    assert copies[0][0] is not None
    assert copies[0][1] is None


def test_replicas_which_run_all_at_once_stack_alone(made: list[int]) -> None:
    model = adapted()
    root_of(model)._is_replica = True  # as nn.DataParallel marks them
    model(inputs())
    assert made == [1] * 6 * DEPTH


def hooks_of(module: Any) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def test_a_base_that_is_given_back_carries_no_hook() -> None:
    model = adapted()
    assert hooks_of(root_of(model)) == 2
    assert hooks_of(model.merge_and_unload()) == 0
    base = Blocks()
    config = msplora.MSPLoraConfig(target_modules=["up"], init_lora_weights="orthogonal", r=6)
    with pytest.raises(MSPLoraError):
        get_peft_model(base, config)
    assert hooks_of(base) == 0


def test_an_injection_that_fails_late_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise MSPLoraError("a site is missing")

    monkeypatch.setattr(tuner, "check_every_site_borrows", refuse)
    base = Blocks()
    with pytest.raises(MSPLoraError, match="a site is missing"):
        get_peft_model(base, msplora.MSPLoraConfig(target_modules=["up"]))
    assert hooks_of(base) == 0


def test_adapters_come_and_go(made: list[int]) -> None:
    model = adapted()
    x = inputs()
    first = model(x)
    model.add_adapter("other", msplora.MSPLoraConfig(target_modules=["up", "mix"], r=4))
    model.double()
    model.set_adapter("other")
    for name, its in model.named_parameters():
        if ".other." in name:
            nn.init.normal_(its)
    second = model(x)
    assert not torch.allclose(first, second)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    model.add_adapter("other", msplora.MSPLoraConfig(target_modules=["mix"], r=4))
    model.double()
    model.set_adapter("other")
    with model.disable_adapter():
        plain = model(x)
    made.clear()
    assert torch.equal(model(x), plain)  # B is zero
    assert made == [DEPTH, DEPTH]  # nothing of the deleted one is stacked
