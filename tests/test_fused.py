"""The fused node against autograd's own derivatives, PEFT's own path, and a float64 oracle."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

import msplora
from msplora import layer, narrow
from msplora.fused import Mix, linear_with_pairs, linear_with_stacks
from msplora.product import stack_a, stack_b
from msplora.stacking import FEW_TOKENS
from oracle import randomise

IN, OUT, RANKS, SCALES = 6, 5, (3, 2, 1), (2.0, 0.7, 5.0)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


class Block(nn.Module):
    """Two layers in a row, each of every kind that is fused."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width, bias=bias)
        self.conv1d = Conv1D(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv1d(torch.tanh(self.linear(x)))


class Blocks(nn.Module):
    def __init__(self, width: int = 32, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, bias) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


class Packed(Tensor):
    """Stands for a weight that is more than its numbers: a quantised or a distributed one."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def adapted(dtype: torch.dtype = FP32, bias: bool = True, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = msplora.MSPLoraConfig(target_modules=["linear", "conv1d"], **changes)
    model = get_peft_model(Blocks(bias=bias).to(dtype), config)
    randomise(model, size=0.1)
    return model.train()


def one_layer(**changes: Any) -> Any:
    """A single adapted layer, as PEFT's caller sees it."""
    return adapted(**changes).base_model.model.layers[1].linear


@contextmanager
def peft_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let PEFT's own forward run in every layer."""
    with monkeypatch.context() as patch:
        patch.setattr(layer.PyramidLayer, "_to_fuse", lambda self: None)
        yield


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the layers that ran fused."""
    calls: list[int] = []

    def counting(node: Any) -> Any:
        return lambda *args: (calls.append(1), node(*args))[1]

    with monkeypatch.context() as patch:
        for node in (linear_with_pairs, linear_with_stacks):
            patch.setattr(layer, node.__name__, counting(node))
        yield calls


@pytest.fixture(params=["few tokens", "many tokens"])
def either_node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the batches of a test for small ones, then for large ones."""
    many = request.param == "many tokens"
    monkeypatch.setattr(layer, "FEW_TOKENS", 0 if many else 10**6)
    monkeypatch.setattr(narrow, "BLOCKED", 0 if many else 10**6)
    monkeypatch.setattr(narrow, "HALVED", 0 if many else 10**6)


def values_and_gradients(model: Any, x: Tensor, seed: int = 7) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of everything that trains."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)  # of the dropout
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y.double() * weights).sum().backward()
    found: dict[str, Any] = {"output": y.detach(), "input": x.grad}
    found |= {name: its.grad for name, its in model.named_parameters() if its.requires_grad}
    return {name: value.clone() for name, value in found.items()}


def closest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, relative to its norm."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name].double() - its.double()).norm() / its.double().norm())
        for name, its in expected.items()
    )


def pieces(levels: int = 3, *, bias: bool = True, transposed: bool = False) -> tuple[Any, ...]:
    """(weight, bias, factors, mix) in float64, everything with a gradient."""
    torch.manual_seed(1)
    weight = torch.randn(IN, OUT).t() if transposed else torch.randn(OUT, IN)
    tensors = [weight, torch.randn(OUT) if bias else None]
    tensors += [torch.randn(rank, IN) for rank in RANKS[:levels]]
    tensors += [torch.randn(OUT, rank) for rank in RANKS[:levels]]
    made = [None if its is None else its.double().requires_grad_() for its in tensors]
    scales = torch.tensor(SCALES[:levels]).double()
    row = scales.repeat_interleave(torch.tensor(RANKS[:levels]))
    return made[0], made[1], made[2:], Mix(RANKS[:levels], row, 0.0, torch.float64)


# The node itself


@pytest.mark.parametrize("shape", [(IN,), (4, IN), (2, 3, IN), (0, IN)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_node_is_the_sum_over_its_levels(shape: tuple[int, ...], bias: bool) -> None:
    weight, offset, factors, mix = pieces(bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    expected = F.linear(x, weight, offset)
    for scale, a, b in zip(SCALES, factors[:3], factors[3:], strict=True):
        expected = expected + scale * (x @ a.t() @ b.t())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = linear_with_pairs(x, weight, offset, factors[:3], factors[3:], mix)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected)


def test_the_node_is_the_one_lora_of_the_stacked_factors() -> None:
    weight, offset, factors, mix = pieces()
    x = torch.randn(4, IN, dtype=torch.float64)
    delta = stack_b(factors[3:], SCALES) @ stack_a(factors[:3])
    found = linear_with_pairs(x, weight, offset, factors[:3], factors[3:], mix)
    torch.testing.assert_close(found, F.linear(x, weight + delta, offset))


@pytest.mark.parametrize("shape", [(IN,), (4, IN), (2, 2, IN)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"levels": 1}, {"bias": False}, {"transposed": True}], ids=str
)
def test_its_first_and_second_derivatives(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    weight, bias, factors, mix = pieces(**options)
    levels = len(mix.ranks)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def node(x: Tensor, weight: Tensor, bias: Any, *factors: Tensor) -> Tensor:
        return linear_with_pairs(x, weight, bias, factors[:levels], factors[levels:], mix)

    assert torch.autograd.gradcheck(node, (x, weight, bias, *factors))
    assert torch.autograd.gradgradcheck(node, (x, weight, bias, *factors), fast_mode=True)


def test_its_derivatives_where_products_are_made_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "BLOCKED", 0)
    blocks: list[int] = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: (blocks.append(len(a)), bmm(a, b))[1])
    weight, bias, factors, mix = pieces()
    x = torch.randn(4, 35, IN, dtype=torch.float64, requires_grad=True)

    def node(x: Tensor, weight: Tensor, bias: Any, *factors: Tensor) -> Tensor:
        return linear_with_pairs(x, weight, bias, factors[:3], factors[3:], mix)

    inputs = (x, weight, bias, *factors)
    found = torch.autograd.grad(node(*inputs).sin().sum(), inputs)
    assert set(blocks) == {4}  # as many as divide 140
    monkeypatch.setattr(narrow, "BLOCKED", 10**6)
    expected = torch.autograd.grad(node(*inputs).sin().sum(), inputs)
    torch.testing.assert_close(found, expected)
    monkeypatch.setattr(narrow, "BLOCKED", 0)
    assert torch.autograd.gradcheck(node, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(node, inputs, fast_mode=True)


@pytest.mark.parametrize("columns", [128, 129, 130, 1000], ids=str)
@pytest.mark.parametrize("transposed", [True, False])
def test_a_product_in_blocks_is_the_product(
    columns: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrow, "BLOCKED", 0)
    left, right = torch.randn(14, 70), torch.randn(70, columns)
    right = right.t().contiguous().t() if transposed else right
    found = narrow.product_of_few_rows(left, right)
    exact = left.double() @ right.double()
    assert found.is_contiguous()
    assert (found - exact).norm() <= 1.5 * ((left @ right) - exact).norm()


def stacks(**options: Any) -> tuple[Any, ...]:
    """(weight, bias, A, B transposed and scaled) of the same numbers."""
    weight, bias, factors, _ = pieces(**options)
    half = len(factors) // 2
    a_RI, b_OR = stack_a(factors[:half]), stack_b(factors[half:], SCALES[:half])
    leaves = (its.detach().requires_grad_() for its in (a_RI, b_OR.t()))
    return weight, bias, *leaves


@pytest.mark.parametrize("shape", [(IN,), (4, IN), (2, 2, IN), (0, IN)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"transposed": True}], ids=str)
def test_the_node_for_few_tokens_and_its_derivatives(
    shape: tuple[int, ...], dropout: float, options: dict[str, Any]
) -> None:
    weight, bias, a_RI, b_RO = stacks(**options)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def node(x: Tensor, weight: Tensor, bias: Any, a_RI: Tensor, b_RO: Tensor) -> Tensor:
        torch.manual_seed(3)
        return linear_with_stacks(x, weight, bias, a_RI, b_RO, dropout)

    if not dropout:
        expected = F.linear(x, weight + (a_RI.t() @ b_RO).t(), bias)
        torch.testing.assert_close(node(x, weight, bias, a_RI, b_RO), expected)
    with torch.no_grad():
        without = node(x, weight, bias, a_RI, b_RO)
    assert torch.equal(node(x, weight, bias, a_RI, b_RO), without)
    assert torch.autograd.gradcheck(node, (x, weight, bias, a_RI, b_RO))
    assert torch.autograd.gradgradcheck(node, (x, weight, bias, a_RI, b_RO), fast_mode=True)


@pytest.mark.parametrize("trained", range(5))
def test_for_few_tokens_too_only_what_asks_gets_a_gradient(trained: int) -> None:
    inputs = [torch.randn(2, IN, dtype=torch.float64), *stacks()]
    leaves = [its.detach().requires_grad_(place == trained) for place, its in enumerate(inputs)]
    x, weight, bias, a_RI, b_RO = leaves
    linear_with_stacks(x, weight, bias, a_RI, b_RO, 0.0).sum().backward()
    assert [its.grad is not None for its in leaves] == [n == trained for n in range(5)]


@pytest.mark.parametrize("trained", range(9))
def test_only_what_asks_for_a_gradient_gets_one(trained: int) -> None:
    """Of the input, the weight, the bias and six factors, one at a time."""
    weight, bias, factors, mix = pieces()
    inputs = [torch.randn(2, IN, dtype=torch.float64), weight, bias, *factors]
    leaves = [its.detach().requires_grad_(place == trained) for place, its in enumerate(inputs)]
    y = linear_with_pairs(leaves[0], leaves[1], leaves[2], leaves[3:6], leaves[6:], mix)
    y.sum().backward()
    assert [its.grad is not None for its in leaves] == [n == trained for n in range(9)]


def test_dropout_has_the_right_gradient_for_the_mask_it_drew() -> None:
    weight, bias, factors, mix = pieces()
    mix = mix._replace(dropout=0.4)
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)

    def node(x: Tensor, weight: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return linear_with_pairs(x, weight, bias, factors[:3], factors[3:], mix)

    assert torch.autograd.gradcheck(node, (x, weight, bias, *factors))
    assert torch.autograd.gradgradcheck(node, (x, weight, bias, *factors), fast_mode=True)


@pytest.mark.parametrize("tokens", [3, FEW_TOKENS])
@pytest.mark.parametrize("ranks", [(8, 4, 2), (4, 2, 1)], ids=str)
def test_the_gradients_hold_no_more_memory_than_the_factors(
    tokens: int, ranks: tuple[int, ...]
) -> None:
    model = adapted(ranks=list(ranks))
    model(torch.randn(tokens, 32)).sum().backward()
    factors: list[Tensor] = [its for a, b, _ in msplora.factors(model).values() for its in (a, b)]
    storages = {}
    for factor in factors:
        assert factor.grad is not None
        storage = factor.grad.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    assert sum(storages.values()) == sum(its.numel() * 4 for its in factors)


# Against PEFT's own path


@pytest.mark.usefixtures("either_node")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_both_paths_agree_in_float32(
    bias: bool, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(bias=bias, lora_dropout=dropout)
    x = torch.randn(2, 5, 32)
    with counted(monkeypatch) as calls:
        found = values_and_gradients(model, x)
    assert len(calls) == 8
    with peft_path(monkeypatch), counted(monkeypatch) as calls:
        expected = values_and_gradients(model, x)
    assert not calls
    assert closest(found, expected) < 1e-5


@pytest.mark.usefixtures("either_node")
def test_both_paths_agree_where_the_bases_biases_train(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(bias=True, lora_dropout=0.0).double()
    for name, parameter in model.named_parameters():
        if name.endswith(("base_layer.bias", "layers.0.linear.base_layer.weight")):
            parameter.requires_grad_(True)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    found = values_and_gradients(model, x)
    assert sum("base_layer" in name for name in found) == 9
    with peft_path(monkeypatch):
        assert closest(found, values_and_gradients(model, x)) < 1e-12


@pytest.mark.usefixtures("either_node")
@pytest.mark.parametrize("scaling", [0.5, 3.0])
def test_both_paths_agree_under_a_scale_set_later(
    scaling: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted().double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    model(x)  # what it keeps of the scales has to follow
    for module in model.modules():
        if isinstance(module, layer.PyramidLayer):
            module.set_scale("default", scaling)
    found = values_and_gradients(model, x)
    with peft_path(monkeypatch):
        assert closest(found, values_and_gradients(model, x)) < 1e-12


@pytest.mark.usefixtures("either_node")
@pytest.mark.parametrize(
    ("dtype", "autocast", "factors"),
    [
        (BF16, None, FP32),
        (FP16, None, FP32),
        (BF16, None, BF16),
        (FP32, BF16, FP32),
        (BF16, BF16, FP32),
        (FP32, FP16, FP32),
    ],
    ids=str,
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_in_half_precision_the_node_is_as_near_to_float64_as_peft_is(
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    factors: torch.dtype,
    dropout: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One layer, so that nothing but this layer rounds; every tensor by itself."""
    model = adapted(dtype, lora_dropout=dropout)
    if factors is BF16:
        model.to(BF16)
    one = model.base_model.model.layers[1].linear
    exact = copy.deepcopy(one).double()
    exact.borrowed.double()
    leaves = [*one.borrowed["default"].parameters()]
    cast = torch.autocast("cpu", dtype=autocast or BF16, enabled=autocast is not None)

    def run(module: Any, x: Tensor, leaves: list[Any], seed: int) -> list[Tensor]:
        x = x.clone().requires_grad_()
        torch.manual_seed(seed)
        y = module(x)
        grads = torch.autograd.grad(y, [x, *leaves], torch.ones_like(y))
        return [y.detach(), *grads]

    def squared_errors(tensors: list[Tensor], oracle: list[Tensor]) -> Tensor:
        pairs = zip(tensors, oracle, strict=True)
        return torch.stack([((its.double() - o).norm() / o.norm()) ** 2 for its, o in pairs])

    ours = theirs = torch.zeros(())
    for seed in range(8):
        x = torch.randn(64, 32).to(dtype)
        with peft_path(monkeypatch):
            oracle = run(exact, x.double(), [*exact.borrowed["default"].parameters()], seed)
        with cast, counted(monkeypatch) as calls:
            ours = ours + squared_errors(run(one, x, leaves, seed), oracle)
        assert calls
        with cast, peft_path(monkeypatch):
            theirs = theirs + squared_errors(run(one, x, leaves, seed), oracle)
    # The scale and what makes up for dropout are rounded where PEFT rounds other things: as often
    # on the whole, but not in every tensor. In float32 products that does not tell.
    slack = 1.3 if dropout and (autocast or factors is not FP32) else 1.1
    ours, theirs = (its.div(8).sqrt() for its in (ours, theirs))
    floor = torch.finfo(autocast or dtype).eps / 16
    assert (ours <= slack * theirs.clamp(min=floor)).all(), (ours / theirs).tolist()


@pytest.mark.usefixtures("either_node")
@pytest.mark.parametrize(
    "changes",
    [
        "DoRA",
        "two adapters",
        "merged",
        "disabled",
        "mixed batch",
        "hook",
        "hook of A",
        "hook of the dropout",
        "hook of all modules",
        "quantised weight",
    ],
)
def test_special_cases_take_pefts_path(changes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(use_dora=changes == "DoRA")
    root = model.base_model.model
    options: dict[str, Any] = {}
    if changes == "two adapters":
        model.add_adapter("other", model.peft_config["default"])
        model.base_model.set_adapter(["default", "other"])
    elif changes == "merged":
        model.merge_adapter()
    elif changes == "disabled":
        model.base_model.disable_adapter_layers()
    elif changes == "mixed batch":
        model.eval()
        options = {"adapter_names": ["default", "__base__"]}
    heard: list[int] = []
    for block in root.layers:
        for one in (block.linear, block.conv1d):
            base: Any = one.base_layer
            if changes == "hook":
                base.register_forward_hook(lambda *args: None)
            elif changes == "hook of A":
                one.lora_A["default"].register_forward_hook(lambda *args: heard.append(1))
            elif changes == "hook of the dropout":
                one.lora_dropout["default"].register_forward_hook(lambda *args: heard.append(1))
            elif changes == "quantised weight":
                del base.weight
                base.weight = torch.randn(64, 32).as_subclass(Packed)
    of_all = register_module_forward_hook(lambda *args: heard.append(1))
    if changes != "hook of all modules":
        of_all.remove()
    with counted(monkeypatch) as calls:
        model(torch.randn(2, 32), **options)
    of_all.remove()
    assert not calls
    assert len(heard) >= (8 if "hook of" in changes else 0)


@pytest.mark.usefixtures("either_node")
def test_function_transforms_see_through_an_adapted_layer() -> None:
    one = one_layer().requires_grad_(False)
    x = torch.randn(4, 3, 32)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: one(row).sum(0)))(x)
    for row, its in zip(x, jacobian, strict=True):
        by_row = torch.autograd.functional.jacobian(lambda row: one(row).sum(0), row)
        assert torch.allclose(its, by_row, atol=1e-5)


@pytest.mark.usefixtures("either_node")
def test_forward_mode_sees_through_an_adapted_layer() -> None:
    one = one_layer()
    x, direction = torch.randn(4, 32), torch.randn(4, 32)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(one(forward_ad.make_dual(x, direction))).tangent
    _, expected = torch.func.jvp(one, (x,), (direction,))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.usefixtures("either_node")
@pytest.mark.parametrize("shape", [(32,), (4, 32), (2, 3, 32)], ids=str)
def test_a_model_may_write_into_an_adapted_layers_output(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Longformer scales its queries."""
    one = one_layer()

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = one

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            y /= 3
            y[..., 0] = 1
            return y.relu_()

    x = torch.randn(shape)
    found = values_and_gradients(Writing(), x)
    with peft_path(monkeypatch):
        assert closest(found, values_and_gradients(Writing(), x)) < 1e-6


@pytest.mark.usefixtures("either_node")
def test_autocast_around_backward_alone_changes_nothing() -> None:
    one = one_layer()
    leaves = [*one.borrowed["default"].parameters()]
    x = torch.randn(4, 32, requires_grad=True)
    expected = torch.autograd.grad(one(x).square().sum(), [x, *leaves])
    loss = one(x).square().sum()
    with torch.autocast("cpu", dtype=BF16):
        found = torch.autograd.grad(loss, [x, *leaves])
    assert all(map(torch.equal, found, expected))


# What is kept for backward


def saved_by(module: Any, x: Tensor) -> list[Tensor]:
    """What autograd keeps of one forward, but for parameters, each storage once."""
    kept: dict[int, Tensor] = {}
    parameters = {its.untyped_storage().data_ptr() for its in module.parameters()}
    parameters |= {its.untyped_storage().data_ptr() for its in module.borrowed.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return list(kept.values())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [FEW_TOKENS - 1, FEW_TOKENS])
def test_backward_keeps_the_input_and_no_copy_of_it(
    dtype: torch.dtype, dropout: float, tokens: int
) -> None:
    one = one_layer(dtype=dtype, lora_dropout=dropout)
    x = torch.randn(tokens, 32, dtype=dtype, requires_grad=True)
    kept = saved_by(one, x)
    few = tokens < FEW_TOKENS
    expected = [((tokens, 32), dtype), ((tokens, 14), FP32)]
    if dropout:  # what it multiplied by: in small batches as PEFT keeps it, else in a byte each
        expected.append(((tokens, 32), FP32 if few else torch.bool))
    if few:
        expected += [((14, 32), FP32), ((14, 64), FP32)]
    assert len(kept) == len(expected)
    assert {(tuple(its.shape), its.dtype) for its in kept} == set(expected)
    assert any(its.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for its in kept)


def train_only(module: Any, factors: str) -> None:
    """Let A train, or B, or neither."""
    module.borrowed.requires_grad_(False)
    for which in factors:
        getattr(module.borrowed["default"], which).requires_grad_(True)


@pytest.mark.usefixtures("either_node")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("factors", ["", "a", "b", "ab"])
def test_backward_keeps_what_it_needs(
    factors: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No input where neither A nor the base trains: below frozen adapters something may train."""
    one = adapted(lora_dropout=dropout).double().base_model.model.layers[1].linear
    train_only(one, factors)
    x = torch.randn(9, 32, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    with counted(monkeypatch) as calls:
        kept = saved_by(one, x)
    assert bool(calls) == (factors != "b")  # of B alone PEFT's way keeps least
    inputs = [its for its in kept if its.shape == x.shape and its.dtype == x.dtype]
    of_x = [its for its in inputs if its.data_ptr() == x.data_ptr()]
    assert bool(of_x) == ("a" in factors)
    assert ((9, 14) in [tuple(its.shape) for its in kept]) == ("b" in factors)
    leaves = [x, *(its for its in one.borrowed["default"].parameters() if its.requires_grad)]
    torch.manual_seed(3)
    found = torch.autograd.grad(one(x).square().sum(), leaves)
    torch.manual_seed(3)
    with peft_path(monkeypatch):
        expected = torch.autograd.grad(one(x).square().sum(), leaves)
    torch.testing.assert_close(found, expected)


# With the rest of PyTorch


@pytest.mark.usefixtures("either_node")
@pytest.mark.parametrize("operation", ["mm", "addmm", "tanh"])
def test_selective_checkpointing_changes_nothing(operation: str) -> None:
    model = adapted().double()
    leaves = [its for its in model.parameters() if its.requires_grad]
    kept = [getattr(torch.ops.aten, operation).default]

    def run(x: Tensor, **how: Any) -> tuple[Tensor, ...]:
        for block in model.base_model.model.layers:
            x = checkpoint(block, x, use_reentrant=False, **how) if how else block(x)  # pyright: ignore
        return torch.autograd.grad(x.square().sum(), leaves)

    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    expected = run(x)
    context = partial(create_selective_checkpoint_contexts, kept)
    torch.testing.assert_close(run(x, context_fn=context), expected)


@pytest.mark.usefixtures("either_node")
def test_a_trace_is_of_any_number_of_tokens(tmp_path: Path) -> None:
    model = adapted().double().eval()
    x = torch.randn(256, 32, dtype=torch.float64)
    with torch.no_grad():
        traced = torch.jit.trace(model.base_model.model, x)
        torch.jit.save(traced, tmp_path / "traced.pt")
        loaded = torch.jit.load(tmp_path / "traced.pt")
        for rows in (x, x[:129]):
            torch.testing.assert_close(loaded(rows), model(rows))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.usefixtures("either_node")
def test_many_gradients_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one = one_layer()
    leaves = [*one.borrowed["default"].parameters()]
    x = torch.randn(4, 32, requires_grad=True)
    directions = torch.randn(3, 4, 64)
    with counted(monkeypatch) as calls:
        found = torch.autograd.grad(one(x), [x, *leaves], directions, is_grads_batched=True)
    assert calls
    y = one(x)
    mapped = torch.vmap(lambda g: torch.autograd.grad(y, [x, *leaves], g))(directions)
    for place, direction in enumerate(directions):
        expected = list(torch.autograd.grad(one(x), [x, *leaves], direction))
        torch.testing.assert_close([its[place] for its in found], expected)
        torch.testing.assert_close([its[place] for its in mapped], expected)


@pytest.mark.usefixtures("either_node")
def test_a_scaling_that_is_a_tensor_has_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    one = one_layer()
    one.scaling["default"] = torch.tensor(1.0, requires_grad=True)
    x = torch.randn(4, 32)
    (found,) = torch.autograd.grad(one(x).sum(), one.scaling["default"])
    assert found.abs() > 0


@pytest.mark.usefixtures("either_node")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_nothing(use_reentrant: bool, dropout: float) -> None:
    one = one_layer(lora_dropout=dropout)
    leaves = [*one.borrowed["default"].parameters()]
    x = torch.randn(5, 32, requires_grad=True)
    found = []
    for run in (one, lambda x: checkpoint(one, x, use_reentrant=use_reentrant)):
        torch.manual_seed(2)
        for leaf in (x, *leaves):
            leaf.grad = None
        run(x).square().sum().backward()
        found.append([leaf.grad.clone() for leaf in (x, *leaves)])  # pyright: ignore
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.usefixtures("either_node")
@pytest.mark.parametrize("dtype", [FP32, pytest.param(BF16, marks=pytest.mark.slow)], ids=str)
def test_compiled_in_one_graph_it_computes_the_same(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model = adapted(dtype)
    x = torch.randn(3, 5, 32, dtype=dtype)
    expected = values_and_gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = values_and_gradients(compiled, x)
    found = {name.removeprefix("_orig_mod."): its for name, its in found.items()}
    assert closest(found, expected) < (1e-6 if dtype is FP32 else 2e-2)


@pytest.mark.slow
def test_compiled_by_inductor_the_product_keeps_its_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a bfloat16 layer with float32 factors: inductor must not drop what a rounding took off."""
    monkeypatch.setattr(layer, "FEW_TOKENS", 0)
    torch._dynamo.reset()
    torch.manual_seed(0)
    weight, x = torch.zeros(48, 32, dtype=BF16), torch.randn(64, 32, dtype=BF16)
    a_factors = [torch.randn(rank, 32) for rank in RANKS]
    b_factors = [torch.randn(48, rank, requires_grad=True) for rank in RANKS]
    mix = Mix(RANKS, torch.ones(sum(RANKS)), 0.0, FP32)

    def run(x: Tensor) -> Tensor:
        return linear_with_pairs(x, weight, None, a_factors, b_factors, mix)

    exact = x.double() @ torch.cat(a_factors).double().mT @ torch.cat(b_factors, 1).double().mT
    for found in (run(x), torch.compile(run, fullgraph=True)(x)):
        error = (found.double() - exact).abs()
        assert (error <= 0.51 * torch.finfo(BF16).eps * exact.abs() + 1e-4).all()


@pytest.mark.usefixtures("either_node")
@pytest.mark.parametrize("use_reentrant", [None, False])
def test_moved_after_injection_it_compiles_with_checkpointing(use_reentrant: bool | None) -> None:
    """What a site keeps was made for another dtype, and may not be made again in the graph."""
    torch._dynamo.reset()
    model = adapted().double()
    x = torch.randn(3, 32, dtype=torch.float64)
    expected = values_and_gradients(model, x)
    model = adapted().double()

    def run(x: Tensor) -> Any:
        return model(x) if use_reentrant is None else checkpoint(model, x, use_reentrant=False)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).detach(), expected["output"])


@pytest.mark.slow
def test_an_autocast_region_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    model = adapted(lora_dropout=0.1)

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BF16):
            return model(x).float().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(3, 32)).backward()
    assert all(a.grad is not None for a, _, _ in msplora.factors(model).values())


@pytest.mark.usefixtures("either_node")
def test_what_a_first_call_keeps_serves_every_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference mode, training, another dtype, a copy: the scales that were kept follow."""
    model = adapted(alphas=[10.1, 3.3, 7.7])
    x = torch.randn(3, 32)
    with torch.inference_mode():
        model(x)
    values_and_gradients(model, x)
    copied = copy.deepcopy(model)
    for later in (model.double(), copied.double()):
        found = values_and_gradients(later, x.double())
        with peft_path(monkeypatch):
            assert closest(found, values_and_gradients(later, x.double())) < 1e-14


@pytest.mark.usefixtures("either_node")
def test_scales_made_in_inference_mode_serve_second_derivatives() -> None:
    one = one_layer()
    one.set_scale("default", 0.5)  # so that they are made in the call
    x = torch.randn(2, 32, requires_grad=True)
    with torch.inference_mode():
        one(torch.randn(2, 32))
    (grad,) = torch.autograd.grad(one(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad is not None


def test_a_model_injected_on_the_meta_device_traces_shapes() -> None:
    config = msplora.MSPLoraConfig(target_modules=["linear"])
    with torch.device("meta"):
        model: Any = inject_adapter_in_model(config, Blocks())
    assert model(torch.randn(2, 32, device="meta")).shape == (2, 32)
