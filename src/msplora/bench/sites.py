"""One linear layer by itself, forward and backward: what a method adds where it acts.

The weight is frozen and the input needs a gradient, as inside a model. No optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .methods import METHODS, NEEDED, SITE_METHODS, checked
from .models import trainable
from .points import DTYPES, SitePoint
from .results import Row
from .timing import figures, run_rounds


class _Model(nn.Module):
    """A list of one block, so that the pyramid has a depth to count."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"proj": layer})])

    @property
    def layer(self) -> nn.Module:
        return self.layers[0]["proj"]  # pyright: ignore[reportIndexIssue]


class SiteStep:
    """Forward and backward through one adapted layer."""

    def __init__(self, model: _Model, x: Tensor, gradient: Tensor, autocast: bool) -> None:
        self.layer = model.layer
        self.parameters = trainable(model)  # a pyramid's are not the layer's own
        self.x = x
        self.gradient = gradient
        self.autocast = torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast)

    def __call__(self) -> None:
        """Once forward and backward; gradients are dropped, as a step of training does."""
        with self.autocast:
            self.layer(self.x).backward(self.gradient)
        self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None


def make_site_step(name: str, weight: nn.Linear, point: SitePoint) -> SiteStep:
    """A method's step on a layer whose weight all methods share."""
    layer = nn.Linear(point.inputs, point.outputs, device="meta")
    layer.weight, layer.bias = weight.weight, weight.bias
    model: Any = _Model(layer)
    method, precision = METHODS[name], DTYPES[point.dtype]
    if method.adapt is not None:
        model = method.adapt(model, r"layers\.\d+\.proj", 0.0, precision.adapters_in_float32)
    device = weight.weight.device
    x = torch.randn(point.tokens, point.inputs, dtype=weight.weight.dtype, device=device)
    gradient = torch.randn(point.tokens, point.outputs, dtype=x.dtype, device=device)
    return SiteStep(model.train(), x.requires_grad_(), gradient, precision.autocast)


def measure_site(
    point: SitePoint,
    methods: Sequence[str],
    rounds: int = 60,
    *,
    warmup: int = 5,
    device: str = "cpu",
    on_step: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Return a row for each method."""
    dtype = getattr(torch, DTYPES[point.dtype].base)
    torch.manual_seed(0)
    weight = nn.Linear(point.inputs, point.outputs, dtype=dtype, device=device)
    weight.requires_grad_(False)
    names = checked(methods, needed=NEEDED, among=SITE_METHODS)
    steps = {name: make_site_step(name, weight, point) for name in names}
    seconds = run_rounds(
        steps,
        rounds,
        warmup=warmup,
        synchronise=torch.cuda.synchronize if device == "cuda" else lambda: None,
        on_step=on_step,
    )
    return [
        {**point.keys(), "method": name, "rounds": rounds, **figures(seconds, name)}
        for name in steps
    ]
