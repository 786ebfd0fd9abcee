"""What an adapted model should compute, written out level by level from the factors and the plan.

Independent of `msplora.product` and `msplora.layer`: here nothing is stacked, every level is a
product of its own, and a convolution is run twice rather than folded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import msplora
from msplora.pyramid import Pair, Plan, Site

ADAPTER = "default"


def plan_of(model: Any, adapter_name: str = ADAPTER) -> Plan:
    return msplora.plan(model, model.peft_config[adapter_name])


def randomise(model: Any, adapter_name: str = ADAPTER, seed: int = 3, size: float = 0.2) -> None:
    """Give every factor of an adapter random numbers, so that no level is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for a, b, _ in msplora.factors(model, adapter_name).values():
            for factor in (a, b):
                factor.copy_(torch.randn(factor.shape, generator=generator) * size)


def root_of(model: Any) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def levels_of(
    model: Any, site: Site, plan: Plan, adapter_name: str = ADAPTER
) -> list[tuple[Pair, Tensor, Tensor, float]]:
    """(pair, A, B, scale) of every level of a site, found by asking each pair whom it serves."""
    factors = msplora.factors(model, adapter_name)
    found = [
        (pair, factors[pair.address][0].detach(), factors[pair.address][1].detach(), pair.scale)
        for pair in plan.pairs
        if site.key in pair.sites
    ]
    assert [pair.level for pair, *_ in found] == [level.name for level in plan.levels]
    return found


def term(site: Site, base: nn.Module, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """What one level adds to the output of a site: ``s B A x``."""
    if site.shape.layout == "embedding":
        return scale * (F.embedding(x, a.t()) @ b.t())
    a, b = a.to(x.dtype), b.to(x.dtype)
    if site.shape.layout == "conv":
        conv: Any = base
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[a.ndim - 2]
        down = convolve(x, a, stride=conv.stride, padding=conv.padding)
        return scale * convolve(down, b, groups=conv.groups)
    return scale * ((x @ a.t()) @ b.t())


def weight_delta(site: Site, base: nn.Module, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """What one level adds to the weight of a site that is linear, an embedding or of experts."""
    if site.shape.layout != "experts":
        delta = scale * b @ a
        return delta.t() if isinstance(base, (Conv1D, nn.Embedding)) else delta
    # PEFT lays A's rows out expert by expert, and B's columns rank by rank.
    experts = site.shape.blocks
    rank = a.shape[0] // experts
    deltas = []
    for expert in range(experts):
        rows = torch.stack([a[expert * rank + place] for place in range(rank)])
        columns = torch.stack([b[:, place * experts + expert] for place in range(rank)], dim=1)
        deltas.append(scale * columns @ rows)
    delta = torch.stack(deltas)
    # PEFT 0.18 takes all experts for (experts, in, out).
    in_first = Version(peft.__version__) < Version("0.19") or getattr(base, "is_transposed", False)
    delta = delta.transpose(1, 2) if in_first and delta.shape[0] > 1 else delta
    return delta[0] if getattr(base, site.key.rpartition(".")[2]).ndim == 2 else delta


@dataclass(frozen=True)
class Call:
    """One call of an adapted layer."""

    site: Site
    layer: Any
    x: Tensor
    output: Tensor

    def base(self) -> nn.Module:
        return self.layer.get_base_layer()

    def change(self) -> Tensor:
        """What the layer adds to its base's output."""
        return self.output - self.base()(self.x)


@contextmanager
def watched(model: Any, plan: Plan) -> Iterator[list[Call]]:
    """Record every call of the plan's sites, by forward hooks on the wrapped layers.

    Sites of experts are left out: their layer has no output of its own.
    """
    calls: list[Call] = []
    handles = []
    for site in plan.sites:
        if site.shape.layout == "experts":
            continue
        layer = root_of(model).get_submodule(site.key)

        def note(layer: nn.Module, args: tuple, output: Tensor, site: Site = site) -> None:
            calls.append(Call(site, layer, args[0].detach(), output.detach()))

        handles.append(layer.register_forward_hook(note))
    try:
        with torch.no_grad():
            yield calls
    finally:
        for handle in handles:
            handle.remove()


class Untied:
    """A base model in which every site has pairs of its own, equal to those it shares."""

    def __init__(
        self, base: nn.Module, model: Any, plan: Plan, adapter_name: str = ADAPTER
    ) -> None:
        self.base = base
        self.leaves: dict[str, list[tuple[Tensor, Tensor]]] = {}  # address -> one per site
        self.weights: dict[str, Tensor] = {}
        for site in plan.sites:
            name = site.key if site.shape.layout == "experts" else f"{site.key}.weight"
            owner = base.get_submodule(name.rpartition(".")[0])
            weight = base.get_parameter(name).detach()
            for pair, a, b, scale in levels_of(model, site, plan, adapter_name):
                own = a.clone().requires_grad_(), b.clone().requires_grad_()
                self.leaves.setdefault(pair.address, []).append(own)
                weight = weight + weight_delta(site, owner, *own, scale).to(weight.dtype)
            self.weights[name] = weight

    def __call__(self, **batch: Tensor) -> Any:
        return torch.func.functional_call(self.base, self.weights, (), batch)

    def gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Address -> the gradients of A and B, summed over the sites that share the pair."""
        return {
            address: (sum_of_gradients([a for a, _ in own]), sum_of_gradients([b for _, b in own]))
            for address, own in self.leaves.items()
        }


def sum_of_gradients(leaves: list[Tensor]) -> Tensor:
    total = torch.zeros_like(leaves[0])
    for leaf in leaves:
        assert leaf.grad is not None
        total += leaf.grad
    return total


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything a failed or undone injection must leave as it was."""
    return {
        "modules": {path: (id(module), type(module)) for path, module in model.named_modules()},
        "state": list(model.state_dict()),
        "requires_grad": {name: its.requires_grad for name, its in model.named_parameters()},
        "training": {path: module.training for path, module in model.named_modules()},
        "attributes": sorted(model.__dict__),
        "peft_config": copy.copy(getattr(model, "peft_config", None)),
    }


def tensors_of(model: Any, adapter_name: str = ADAPTER) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Copies of the factors, by address."""
    return {
        address: (a.detach().clone(), b.detach().clone())
        for address, (a, b, _) in msplora.factors(model, adapter_name).items()
    }


def same_tensors(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two sets of factors are the same, bit for bit."""
    return list(first) == list(second) and all(
        torch.equal(first[address][part], second[address][part])
        for address in first
        for part in (0, 1)
    )


def assert_shared(model: Any, plan: Plan, adapter_name: str = ADAPTER) -> None:
    """Every site of a pair reads the very parameters that `factors` and the state dict show."""
    factors = msplora.factors(model, adapter_name)
    root = root_of(model)
    owned = {id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len([name for name in names if f".{adapter_name}.factor" in name]) == 2 * len(factors)
    for address, (a, b, _) in factors.items():
        pair = next(pair for pair in plan.pairs if pair.address == address)
        place = [level.name for level in plan.levels].index(pair.level)
        assert {id(a), id(b)} <= owned
        for key in pair.sites:
            layer = layer_of(root, key, experts=pair.shape.layout == "experts")
            borrowed = layer.borrowed[adapter_name]
            assert borrowed.a.factors[place].factor is a, (address, key)
            assert borrowed.b.factors[place].factor is b, (address, key)


def layer_of(root: nn.Module, key: str, experts: bool = False) -> Any:
    """The wrapped layer of a site; for experts the wrapper of the parameter."""
    if not experts:
        return root.get_submodule(key)
    path, _, name = key.rpartition(".")
    layer: Any = root.get_submodule(path)
    while layer.parameter_name != name:
        layer = layer.base_layer
    return layer
