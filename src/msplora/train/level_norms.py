"""How much each level adds to the weights, and its share of the gradient, in a trainer's log."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from msplora.pyramid import Pair
from msplora.spectrum import as_matrices
from msplora.store import factors, plan_of

from .levels import level_parameters, whole


class LevelNorms(TrainerCallback):
    """Adds `norm/<level>` and `gradient_norm/<level>` to every entry of the loss curve.

    ::

        LevelNorms().attach(trainer)

    `norm/<level>` is the Frobenius norm of what the level adds to a weight, ``s B A``, in the root
    mean square over the adapted weights. `gradient_norm/<level>` is the 2-norm of the gradient of
    the level's pairs, as the optimiser gets it (clipped), of the last step before the entry; a
    shared pair counts once, and a level that is frozen has none.
    """

    def __init__(self, adapter_name: str = "default") -> None:
        self.adapter_name = adapter_name
        self._gradients: dict[str, float] = {}

    def attach(self, trainer: Trainer) -> None:
        """Stand before the trackers of `report_to`: they pass on what stands in an entry so far."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Measure the gradient where the step is going to be logged."""
        step = state.global_step + 1
        if step % state.logging_steps == 0 or (step == 1 and args.logging_first_step):
            by_level = level_parameters(model, self.adapter_name)
            gradients = {
                level: [its.grad for its in parameters if its.grad is not None]
                for level, parameters in by_level.items()
            }
            self._gradients = {
                f"gradient_norm/{level}": _norm(its) for level, its in gradients.items() if its
            }

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **_: Any
    ) -> None:
        """Add the norms to an entry of the loss curve."""
        if logs is None or "loss" not in logs:
            return
        found = {
            f"norm/{level}": norm for level, norm in level_norms(model, self.adapter_name).items()
        }
        logs.update(found, **self._gradients)
        # The trainer has put a copy into its history already.
        state.log_history[-1].update(found, **self._gradients)
        self._gradients = {}


@torch.no_grad()
def level_norms(model: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """Level → the Frobenius norm of what it adds to a weight, root mean square over the weights.

    Through the factors alone: ``‖B A‖² = Σ (BᵀB) ∘ (A Aᵀ)``, of matrices as small as the rank.

    Raises:
        MSPLoraError: the model has no such MSPLoRA adapter.
    """
    found = factors(model, adapter_name)
    squares: dict[str, list[tuple[float, int]]] = {}
    for pair, (a, b, _) in zip(plan_of(model, adapter_name).pairs, found.values(), strict=True):
        square = _square(pair, whole(a), whole(b))
        squares.setdefault(pair.level, []).append((square * len(pair.sites), len(pair.sites)))
    return {
        level: math.sqrt(sum(square for square, _ in of) / sum(sites for _, sites in of))
        for level, of in squares.items()
    }


def _square(pair: Pair, a: Tensor, b: Tensor) -> float:
    """``‖s B A‖²`` of one pair."""
    experts = pair.shape.blocks if pair.shape.layout == "experts" else 1
    groups = pair.shape.blocks if pair.shape.layout == "conv" else 1
    a_RI, b_OR = as_matrices(a.float(), b.float(), experts=experts, groups=groups)
    return pair.scale**2 * ((b_OR.mT @ b_OR) * (a_RI @ a_RI.mT)).cpu().double().sum().item()


def _norm(gradients: Iterable[Tensor]) -> float:
    return math.sqrt(sum(whole(its).float().square().sum().item() for its in gradients))
