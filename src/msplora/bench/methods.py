"""The methods that are measured side by side: how a base becomes each of them.

All share the base's frozen weights, train the same head and ask for the gradient of the embedding.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msplora.errors import MSPLoraError, nearest

from .points import Point

if TYPE_CHECKING:
    from torch import nn

RANK = 8
PYRAMID_RANKS = (8, 4, 2)
ALPHA = 16
VERA_RANK = 256
"""VeRA's own default: it trains vectors only, and needs wide frozen matrices."""

CONTROL = "lora-again"


@dataclass(frozen=True)
class Method:
    """One way of training a model."""

    name: str
    about: str
    adapt: Callable[[nn.Module, str, float, bool], Any] | None
    """(module, regex of paths, dropout, adapters in float32) → the same module, adapted in place;
    None: nothing is added to the base."""
    whole: bool = False
    """It trains every weight, and so needs copies of its own."""


def _peft_method(
    make_config: Callable[[Any, str, float], Any],
) -> Callable[[nn.Module, str, float, bool], Any]:
    def adapt(model: nn.Module, pattern: str, dropout: float, in_float32: bool) -> Any:
        import peft

        config = make_config(peft, pattern, dropout)
        whole: Any = model
        wrapped: Any = peft.get_peft_model(whole, config, autocast_adapter_dtype=in_float32)
        # PEFT's outermost wrapper only passes its arguments on.
        return wrapped.get_base_model()

    return adapt


def _lora(rank: int) -> Callable[[nn.Module, str, float, bool], Any]:
    return _peft_method(
        lambda peft, pattern, dropout: peft.LoraConfig(
            r=rank, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=pattern
        )
    )


def _msplora(peft: Any, pattern: str, dropout: float) -> Any:
    import msplora

    return msplora.MSPLoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=pattern
    )


def _gralora(peft: Any, pattern: str, dropout: float) -> Any:
    # Its blocks must divide the rank and both sides of every layer: two do, in all our shapes.
    return peft.GraloraConfig(
        r=RANK, gralora_k=2, alpha=ALPHA, gralora_dropout=dropout, target_modules=pattern
    )


def _vera(peft: Any, pattern: str, dropout: float) -> Any:
    return peft.VeraConfig(r=VERA_RANK, vera_dropout=dropout, target_modules=pattern)


def _branches(model: nn.Module, pattern: str, dropout: float, in_float32: bool) -> Any:
    import torch

    from .branches import add_branches

    dtype = torch.float32 if in_float32 else next(model.parameters()).dtype
    add_branches(model, pattern, ranks=PYRAMID_RANKS, alpha=ALPHA, dropout=dropout, dtype=dtype)
    return model


METHODS = {
    method.name: method
    for method in (
        Method("floor", "the head only", None),
        Method("full", "every weight", None, whole=True),
        Method("lora", "PEFT's LoRA, r = 8", _lora(RANK)),
        Method(CONTROL, "the same once more: what the clock alone makes different", _lora(RANK)),
        Method("lora-equal-rank", "PEFT's LoRA, r = 14", _lora(sum(PYRAMID_RANKS))),
        Method("gralora", "PEFT's GraLoRA, r = 8, 2 × 2 blocks", _peft_method(_gralora)),
        Method("vera", "PEFT's VeRA, r = 256", _peft_method(_vera)),
        Method("branches", "the pyramid as three separate branches", _branches),
        Method("msplora", "the pyramid, r = 8", _peft_method(_msplora)),
    )
}
DEFAULT = ("floor", "lora", CONTROL, "msplora")
NEEDED = ("floor", "lora")
"""What ratios are to."""
SITE_METHODS = ("floor", "lora", CONTROL, "lora-equal-rank", "branches", "msplora")
"""Those of which one layer by itself says something."""


def checked(
    names: Sequence[str], *, needed: Sequence[str] = (), among: Sequence[str] = tuple(METHODS)
) -> list[str]:
    """The methods in the table's order, each once, with those that are needed anyway.

    Raises:
        MSPLoraError: one that is not known, or not here.
    """
    for name in names:
        if name not in among:
            raise MSPLoraError(
                f"there is no method {name!r}.{nearest(name, among)} There are: {', '.join(among)}."
            )
    return [name for name in METHODS if name in names or name in needed]


def build(name: str, base: Any, point: Point) -> Any:
    """A model of its own that trains by the method, ready for a step.

    Args:
        name: one of `METHODS`.
        base: what `build_base` made, of which the frozen weights are shared; it stays as it is.
        point: the targets, the dropout, the precision and the checkpointing.
    """
    import torch

    from .models import head_of, shared_copy

    method = METHODS[name]
    model = copy.deepcopy(base).requires_grad_(True) if method.whole else shared_copy(base)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # Deprecations within the libraries; VeRA on what saving it would need.
        warnings.simplefilter("ignore")
        if method.adapt is not None:
            pattern = point.its_shape.pattern(point.targets)
            in_float32 = point.precision.adapters_in_float32
            model = method.adapt(model, pattern, point.dropout, in_float32)
        head_of(model).requires_grad_(True)  # PEFT freezes what is not its own
        model.enable_input_require_grads()
        if point.checkpointing != "none":
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": point.checkpointing == "reentrant"}
            )
    return model.train()
