"""The one owner of every pair: a store registered once on the wrapped base model.

Layers borrow (`layer.py`); nothing else registers a pair. So a state dict lists each tensor once,
FSDP and ZeRO, which shard by block, see it in no block, and an optimiser gets it once. Tensors are
named ``pyramid_store.<address>/pair.msplora_A.<adapter>.factor`` (dots in the address written as
slashes); in a file the adapter's name is left out.

A plain module, not PEFT's `AuxiliaryTrainingWrapper`: docs/decisions.md says why.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MSPLoraError, TensorsError
from .factor import Factor
from .finite import is_finite
from .matching import STORE_NAME
from .pyramid import Pair, Plan
from .stacking import Stacks

A, B, MAGNITUDE = "msplora_A", "msplora_B", "msplora_magnitude"
# Ends the name of every entry. PEFT finds `modules_to_save` by the end of a module's name, so a
# name that ended in a kind ("…/pre_classifier") would be taken for one of the model's own modules.
_PAIR, _SITE = "/pair", "/site"
_SHOWN = 8


class Store(nn.Module):
    """All pairs of all adapters of one model, and DoRA's magnitudes."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: dict[str, Plan] = {}
        self.stacks = Stacks()
        self.register_load_state_dict_pre_hook(_check_tensors)

    def forward(self, x: Any) -> Any:
        """Pass `x` through: in an `nn.Sequential` the store is one of the steps."""
        return x

    def add(
        self,
        plan: Plan,
        adapter_name: str,
        *,
        init: bool | str = True,
        dtype_and_device: Mapping[str, tuple[torch.dtype, torch.device]],
    ) -> None:
        """Create the pairs of an adapter.

        Args:
            plan: which pairs.
            adapter_name: whose.
            init: as `init_lora_weights`: True (A Kaiming-uniform, B zero), "gaussian" (A normal),
                "orthogonal" (A and B not zero, their product is), False (random B).
            dtype_and_device: pair address -> where and as what to create it.
        """
        self.plans[adapter_name] = plan
        for pair in plan.pairs:
            dtype, device = dtype_and_device[pair.address]
            shapes = pair.shape.a(pair.rank), pair.shape.b(pair.rank)
            a, b = (Factor(torch.empty(its, dtype=dtype, device=device)) for its in shapes)
            # Only now: a context for low memory puts a parameter on meta as it is registered.
            if a.factor.device.type != "meta":
                _initialise(pair, init, a.factor, b.factor)
            self._put(pair.address + _PAIR, A, adapter_name, a)
            self._put(pair.address + _PAIR, B, adapter_name, b)

    def add_magnitude(self, key: str, adapter_name: str, magnitude: nn.Module) -> None:
        """Take over DoRA's magnitude of the site `key`."""
        self._put(key + _SITE, MAGNITUDE, adapter_name, magnitude)

    def pair(self, address: str, adapter_name: str) -> tuple[Factor, Factor]:
        """The (A, B) of one pair."""
        entry: Any = self._modules[_entry_name(address + _PAIR)]
        return getattr(entry, A)[adapter_name], getattr(entry, B)[adapter_name]

    def of_adapter(self, adapter_name: str) -> Iterator[nn.Module]:
        """Every module that holds parameters of one adapter."""
        for entry in self.children():
            for by_adapter in entry.children():
                if adapter_name in by_adapter:  # pyright: ignore[reportOperatorIssue]
                    yield by_adapter[adapter_name]  # pyright: ignore[reportIndexIssue]

    def shapes(self, adapter_name: str) -> dict[str, tuple[int, ...] | None]:
        """The names of an adapter's tensors in this store's state dict, with their shapes.

        By the plan: here, a tensor that is sharded has another. `None` is a magnitude's, of which
        only its layer knows.
        """
        plan = self.plans.get(adapter_name)
        planned = {}
        for pair in plan.pairs if plan else ():
            planned[name_in_file(pair.address, A)] = pair.shape.a(pair.rank)
            planned[name_in_file(pair.address, B)] = pair.shape.b(pair.rank)
        found = {}
        for name in self.state_dict():
            place, of_adapter, last = name.rsplit(".", 2)
            if of_adapter == adapter_name:
                found[name] = planned.get(f"{place}.{last}")
        return found

    def delete(self, adapter_name: str) -> None:
        """Forget an adapter; deleting one that is gone already does nothing."""
        if self.plans.pop(adapter_name, None) is None:
            return
        self.stacks.forget(adapter_name)
        for name, entry in list(self._modules.items()):
            for by_adapter in entry.children():  # pyright: ignore[reportOptionalMemberAccess]
                if adapter_name in by_adapter:  # pyright: ignore[reportOperatorIssue]
                    del by_adapter[adapter_name]  # pyright: ignore[reportIndexIssue]
            if not any(True for _ in entry.parameters()):  # pyright: ignore
                del self._modules[name]

    def cast(self, adapter_name: str, from_dtypes: set[torch.dtype], to: torch.dtype) -> None:
        """Change the dtype of an adapter's parameters on their owners: nothing is untied."""
        for module in self.of_adapter(adapter_name):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dtype in from_dtypes:
                    changed = nn.Parameter(parameter.data.to(to), parameter.requires_grad)
                    setattr(module, name, changed)

    def _put(self, name: str, kind: str, adapter_name: str, module: nn.Module) -> None:
        name = _entry_name(name)
        if name not in self._modules:
            self.add_module(name, nn.Module())
        entry: Any = self._modules[name]
        if kind not in entry._modules:
            entry.add_module(kind, nn.ModuleDict())
        entry._modules[kind][adapter_name] = module


def name_in_file(address: str, factor: str) -> str:
    """How the name of a pair's A or B ends in an adapter's file."""
    return f"{_entry_name(address + _PAIR)}.{factor}.factor"


def _entry_name(name: str) -> str:
    # A dot would start a new module.
    return name.replace(".", "/")


def find_store(model: nn.Module) -> Store | None:
    """The store of a model, wherever the model is wrapped; `None` if it has none."""
    for module in model.modules():
        # It is the last child of what it is registered on: asking there spares the walk to it.
        for its in (module, module._modules.get(STORE_NAME)):
            if isinstance(its, Store):
                return its
    return None


def factors(
    model: nn.Module, adapter_name: str = "default"
) -> Mapping[str, tuple[nn.Parameter, nn.Parameter, float]]:
    """The live pairs of an adapter, each once.

    Args:
        model: a `PeftModel`, or a model into which the adapter was injected.
        adapter_name: which adapter.

    Returns:
        Address -> ``(A, B, scale)`` in the plan's order: leaf parameters, the same objects at every
        call; editing them in place acts on the next forward. Shapes: A (rank, in), B (out, rank).

    Raises:
        MSPLoraError: the model has no such MSPLoRA adapter.
    """
    plan, store = plan_of(model, adapter_name), find_store(model)
    assert store is not None
    found_pairs: OrderedDict[str, tuple[nn.Parameter, nn.Parameter, float]] = OrderedDict()
    for pair in plan.pairs:
        a, b = store.pair(pair.address, adapter_name)
        found_pairs[pair.address] = (a.factor, b.factor, pair.scale)
    return found_pairs


def plan_of(model: nn.Module, adapter_name: str = "default") -> Plan:
    """The plan that an adapter of this model was made by.

    Raises:
        MSPLoraError: the model has no such MSPLoRA adapter.
    """
    store = find_store(model)
    plans = {} if store is None else store.plans
    if adapter_name not in plans:
        found = f"its MSPLoRA adapters are {sorted(plans)}" if plans else "it has none"
        raise MSPLoraError(
            f"this {type(model).__name__} has no MSPLoRA adapter {adapter_name!r}: {found}."
        )
    return plans[adapter_name]


def _initialise(pair: Pair, init: bool | str, a: Tensor, b: Tensor) -> None:
    """Give A and B of a new pair their first numbers, in place."""
    if init == "orthogonal":
        _initialise_orthogonal(pair, a, b)
        return
    if pair.shape.layout == "embedding":
        # As PEFT has it: the rows of A are looked up, so A is zero at the start and B is not.
        if init is False:
            nn.init.normal_(a)
        else:
            nn.init.zeros_(a)
        nn.init.normal_(b)
        return
    if init == "gaussian":
        nn.init.normal_(a, std=1 / pair.rank)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    if init is False:
        nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    else:
        nn.init.zeros_(b)


@torch.no_grad()
def _initialise_orthogonal(pair: Pair, a: Tensor, b: Tensor) -> None:
    """A and B of full scale whose product is zero: they use complementary halves of a basis."""
    if pair.rank % 2 or pair.shape.layout != "linear":
        raise MSPLoraError(
            f"init_lora_weights='orthogonal' needs even ranks and linear layers, but pair "
            f"{pair.address!r} has rank {pair.rank} and layout {pair.shape.layout!r}. Choose even "
            f"ranks (such as 8, 4, 2), or another initialisation."
        )
    basis, _ = torch.linalg.qr(torch.randn(pair.rank, pair.rank, device=a.device))
    half = pair.rank // 2
    a.copy_(basis[:half].t() @ torch.randn(half, a.shape[1], device=a.device) / 10)
    b.copy_(torch.randn(b.shape[0], half, device=b.device) @ basis[half:] / 10)


def _check_tensors(store: Store, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse to load an adapter whose tensors are missing, left over, misshapen or not finite.

    Runs before anything is copied. An adapter of which the state dict holds nothing is not being
    loaded; one of which it holds something has to be whole.
    """
    expected = {f"{prefix}{name}": tensor for name, tensor in store.state_dict().items()}
    by_adapter: dict[str, list[str]] = {}
    for key in expected:
        by_adapter.setdefault(key.split(".")[-2], []).append(key)
    given = {key: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    problems = [f"{key} is not one of this adapter's" for key in given if key not in expected]
    for adapter_name in store.plans:
        of_adapter = by_adapter.get(adapter_name, [])
        present = [key for key in of_adapter if key in given]
        if present:
            problems += [f"{key} is missing" for key in of_adapter if key not in given]
        for key in present:
            wanted, found = expected[key], given[key]
            if tuple(found.shape) != tuple(wanted.shape):
                problems.append(
                    f"{key} has shape {tuple(found.shape)}, this model needs {tuple(wanted.shape)}"
                )
            elif found.device.type != "meta" and not is_finite(found):
                problems.append(f"{key} holds values that are not finite")
    raise_for(problems)


def raise_for(problems: list[str]) -> None:
    """Raise what is wrong with an adapter's tensors, if anything is."""
    if not problems:
        return
    raise TensorsError(
        f"the adapter's tensors do not fit this model ({len(problems)} problem(s)); nothing was "
        f"loaded:\n{listed(problems)}\nIs it whole, and was it made for this base model?"
    )


def listed(problems: list[str]) -> str:
    """The first of several problems, one a line, and how many more there are."""
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return "\n".join(f"  {its}" for its in problems[:_SHOWN] + more)


__all__ = ["STORE_NAME", "Factor", "Store", "factors", "find_store"]
