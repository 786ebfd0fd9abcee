"""Reading gradients beside an optimiser's step: in float16 they are scaled, and steps skipped."""

from __future__ import annotations

from typing import Any

import torch

from msplora.errors import ConfigError


def refuse_scaled(args: Any, method: str) -> None:
    """Refuse a Trainer's run in float16 whose gradients stay scaled.

    Args:
        args: the trainer's.
        method: how it is called in the message.

    Raises:
        ConfigError: they would stay so.
    """
    if args.fp16 and not args.max_grad_norm:
        raise ConfigError(
            f"in float16 gradients are scaled until they are clipped, and {method} adds to them "
            f"what is not. Set max_grad_norm above 0, or train in bfloat16."
        )


def counts(optimizer: Any) -> bool:
    """Whether a step that was just made counts: not one that `GradScaler` skipped, whose gradients
    are not all finite.
    """
    if getattr(optimizer, "step_was_skipped", False):  # accelerate's, in float16
        return False
    # All of the optimiser's: for any one of them GradScaler leaves out the whole step.
    parameters = [its for group in optimizer.param_groups for its in group["params"]]
    found = [torch.isfinite(its.grad).all() for its in parameters if its.grad is not None]
    return not found or bool(torch.stack([its.to(found[0].device) for its in found]).all())
