"""A layer of ElaLoRA: factors whose rank can change, with a diagonal between."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from msplora import _peft
from msplora.sisters.layer import SisterLayer

from .config import ElaLoraConfig
from .ranks import scaling_of

RANK_DIMENSION = {"elalora_A": 0, "elalora_E": 0, "elalora_B": 1}
"""Container -> the dimension of its tensors that counts ranks."""


class Weight(nn.Module):
    """One factor of one adapter."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensor)


@dataclass
class Record:
    """Where a layer's rank is written down; the layers of an adapter share `ranks`."""

    config: ElaLoraConfig
    key: str
    ranks: dict[str, int] = field(default_factory=dict)
    """Key -> rank, of every layer of the adapter."""

    def write(self, rank: int) -> None:
        """Take a new rank down, in the config too.

        All layers are named there: else a layer that has `r` could be taken for what the pattern of
        another one's key, or one of the user's, matches.
        """
        self.ranks[self.key] = rank
        self.config.rank_pattern = dict(self.ranks)


def rank_of(config: ElaLoraConfig, key: str) -> int:
    """The rank of a layer: its own entry's, which moves write, or that of PEFT's look-up."""
    pattern = config.rank_pattern or {}
    if key not in pattern:
        key = _peft.get_pattern_key(list(pattern), key)
    return pattern.get(key, config.r)


class ElaLoraLayer(SisterLayer):
    """Mixed in before a PEFT LoRA layer class."""

    method = "ElaLoRA"
    containers = tuple(RANK_DIMENSION)
    records: dict[str, Record]
    """Adapter -> where its rank is written down."""

    def make_containers(self) -> None:
        super().make_containers()
        self.records = {}

    def add(self, adapter_name: str, config: Any, key: str) -> None:
        layer: Any = self
        rank = rank_of(config, key)
        a = torch.randn(rank, layer.in_features) * 0.02
        b = torch.randn(layer.out_features, rank) * 0.02
        e = torch.zeros(rank, 1) if config.init_lora_weights else torch.randn(rank, 1)
        for name, tensor in zip(self.containers, (a, e, b), strict=True):
            getattr(layer, name)[adapter_name] = Weight(tensor)
        self.records[adapter_name] = Record(config, key)
        self.settle(adapter_name, rank, scaling_of(config), config)

    def a_RI(self, adapter_name: str) -> Tensor:
        factors = self.factors(adapter_name)
        return factors["elalora_E"] * factors["elalora_A"]

    def b_OR(self, adapter_name: str) -> Tensor:
        return self.factors(adapter_name)["elalora_B"]

    def factors(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """Container -> this adapter's parameter in it."""
        return {name: getattr(self, name)[adapter_name].weight for name in self.containers}

    def room(self, adapter_name: str) -> int:
        """How many ranks an adapter can gain here: a new one is at right angles to the others."""
        layer: Any = self
        return min(layer.in_features, layer.out_features) - layer.r[adapter_name]

    def replace(self, adapter_name: str, tensors: dict[str, Tensor]) -> None:
        """Put tensors of another rank in the places of an adapter's. The parameters stay, so that
        whoever holds them (an optimiser, above all) holds the new numbers."""
        layer: Any = self
        for name, parameter in self.factors(adapter_name).items():
            parameter.grad = None
            # While a graph is alive (its loss in a variable) the parameter keeps the node that
            # takes in its gradients, and that node the old shape, which the next backward would
            # be refused for. A change of type is what makes torch drop it.
            other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
            parameter.data = parameter.data.new_empty(0, dtype=other)
            parameter.data = tensors[name]
        rank = len(tensors["elalora_E"])
        record = self.records[adapter_name]
        layer.r[adapter_name] = rank
        # PEFT's set_scale and unscale_layer compute the scale anew, as alpha / r.
        layer.lora_alpha[adapter_name] = scaling_of(record.config) * rank
        record.write(rank)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)  # pyright: ignore[reportAttributeAccessIssue]
        self.records.pop(adapter_name, None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Before the containers load: take on the ranks of what is loaded, such as a checkpoint of
        # an earlier step.
        for adapter_name in self.records:
            for name in self.containers:  # what was saved when a factor was a bare parameter
                older = f"{prefix}{name}.{adapter_name}"
                if older in state_dict:
                    state_dict[f"{older}.weight"] = state_dict.pop(older)
            saved = state_dict.get(f"{prefix}elalora_E.{adapter_name}.weight")
            factors = self.factors(adapter_name)
            if saved is None or len(saved) == len(factors["elalora_E"]):
                continue
            resized = {}
            for name, parameter in factors.items():
                shape = list(parameter.shape)
                shape[RANK_DIMENSION[name]] = len(saved)
                resized[name] = parameter.data.new_zeros(shape)
            self.replace(adapter_name, resized)
        super()._load_from_state_dict(state_dict, prefix, *args)  # pyright: ignore

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """Path -> layer, of an ElaLoRA adapter; empty if the model has none of that name."""
    return {
        path: its
        for path, its in model.named_modules()
        if isinstance(its, ElaLoraLayer) and adapter_name in its.records
    }
