"""A layer with Hydra's two branches."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from msplora import _peft
from msplora.errors import UnsupportedError
from msplora.sisters.layer import SisterLayer

from .product import Branch, bias_delta, lora_a, lora_b


class HydraLayer(SisterLayer):
    """Mixed in before a PEFT LoRA layer class."""

    method = "Hydra"
    containers = (
        "hydra_parallel_A",
        "hydra_parallel_B",
        "hydra_sequential_A",
        "hydra_sequential_B",
    )
    projected: dict[str, Tensor]
    """Merged adapter -> ``A_s W0``, of the base it was merged into."""
    merged_bias: dict[str, Tensor]
    """Merged adapter -> what it added to the base's bias."""

    def make_containers(self) -> None:
        super().make_containers()
        self.projected, self.merged_bias = {}, {}

    def add(self, adapter_name: str, config: Any, key: str) -> None:
        layer: Any = self
        in_features, out_features = layer.in_features, layer.out_features
        shapes = (
            (in_features, config.r_parallel),
            (config.r_parallel, out_features),
            (out_features, config.r_sequential),
            (config.r_sequential, out_features),
        )
        for name, (i, o) in zip(self.containers, shapes, strict=True):
            linear = nn.Linear(i, o, bias=config.branch_bias)
            if config.init_lora_weights:
                _initialise(linear, to_zero=name.endswith("_B"))
            getattr(layer, name)[adapter_name] = linear
        self.settle(adapter_name, config.r, config.scale, config)

    def branches(self, adapter_name: str) -> tuple[Branch, Branch]:
        """The parallel and the sequential branch, live."""
        a_p, b_p, a_s, b_s = (getattr(self, name)[adapter_name] for name in self.containers)
        return (
            Branch(a_p.weight, b_p.weight, a_p.bias, b_p.bias),
            Branch(a_s.weight, b_s.weight, a_s.bias, b_s.bias),
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        if layer.disable_adapters or layer.merged:
            return super().forward(x, *args, **kwargs)  # pyright: ignore
        z = layer.base_layer(x, *args, **kwargs)
        y = z
        for name in layer.active_adapters:
            if name not in layer.hydra_parallel_A:
                continue
            parallel, sequential = self.branches(name)
            dropout, dtype = layer.lora_dropout[name], parallel.a_RI.dtype
            added = parallel(layer._cast_input_dtype(x, dtype), dropout)
            # The base's own output, whatever other adapters add to it.
            added = added + sequential(layer._cast_input_dtype(z, dtype), dropout)
            y = y + added * layer.scaling[name]
        return y.to(z.dtype)

    def lacks_bias(self, adapter_name: str) -> bool:
        """Whether an adapter's branches have biases, and the base layer none to merge them into."""
        layer: Any = self
        held = layer.hydra_parallel_A
        has_biases = adapter_name in held and held[adapter_name].bias is not None
        return has_biases and layer.get_base_layer().bias is None

    def a_RI(self, adapter_name: str) -> Tensor:
        parallel, sequential = self.branches(adapter_name)
        projected = self.projected.get(adapter_name)
        if projected is None:
            projected = sequential.a_RI @ self._base_OI().to(sequential.a_RI)
        return lora_a(parallel, projected)

    def b_OR(self, adapter_name: str) -> Tensor:
        return lora_b(*self.branches(adapter_name))

    def _base_OI(self) -> Tensor:
        """W0, without what is merged into it."""
        layer: Any = self
        base = layer.get_base_layer()
        weight = dequantize_module_weight(base)
        if isinstance(base, Conv1D) or getattr(layer, "fan_in_fan_out", False):
            weight = weight.t()
        # Not the merged weight: a second adapter's sequential branch reads the base's output too.
        for name in layer.merged_adapters:
            weight = weight - (self.b_OR(name) @ self.a_RI(name)).to(weight) * layer.scaling[name]
        return weight.detach()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        layer: Any = self
        base = layer.get_base_layer()
        for name in _peft.check_adapters_to_merge(layer, adapter_names):
            if name not in layer.hydra_parallel_A:
                continue
            if self.lacks_bias(name):
                raise nowhere_to_merge("a layer that they adapt")
            parallel, sequential = self.branches(name)
            bias = base.bias
            for its in self.merged_bias.values():
                bias = bias - its.to(bias)  # the model may have been moved since
            added = bias_delta(parallel, sequential, layer.scaling[name], bias)
            if safe_merge and added is not None and not torch.isfinite(added).all():
                raise ValueError(
                    f"the adapter {name!r} would put numbers that are not finite into "
                    f"a bias; it seems to be broken."
                )
            projected = sequential.a_RI @ self._base_OI().to(sequential.a_RI)
            self.projected[name] = projected
            try:
                super().merge(safe_merge, [name])  # pyright: ignore
            except BaseException:
                del self.projected[name]
                raise
            if added is not None:
                self.merged_bias[name] = added.to(base.bias)
                layer.get_base_layer().bias += self.merged_bias[name]

    @torch.no_grad()
    def unmerge(self) -> None:
        layer: Any = self
        super().unmerge()  # pyright: ignore
        for added in self.merged_bias.values():
            bias = layer.get_base_layer().bias
            bias -= added.to(bias)
        self.merged_bias.clear()
        self.projected.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        layer: Any = self
        # A plain LoRA has no place for what a bias passes through the sequential branch.
        has_bias = layer.get_base_layer().bias is not None
        return not has_bias and layer.hydra_parallel_A[adapter_name].bias is None


def nowhere_to_merge(where: str) -> UnsupportedError:
    """The refusal of a merge; `where` names a layer that lacks a bias."""
    return UnsupportedError(
        f"Hydra's branches have biases (branch_bias=True), and {where} has none to merge them "
        f"into. Use the adapter unmerged, or train it with branch_bias=False."
    )


def _initialise(linear: nn.Linear, to_zero: bool) -> None:
    if to_zero:
        nn.init.zeros_(linear.weight)
    else:
        nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
