"""One training step: forward, backward, AdamW, gradients dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .methods import build
from .models import batch_of, compiled_loss, loss_of, trainable
from .points import Point

LEARNING_RATE = 1e-4


class Step:
    """A model, its optimiser and its input: calling it takes one step."""

    def __init__(
        self, name: str, model: Any, point: Point, device: str, backend: str = "inductor"
    ) -> None:
        """Get ready to step.

        Args:
            name: the method, for what is compiled.
            model: what `build` made.
            point: precision, and whether it is compiled.
            device: "cpu" or "cuda".
            backend: of torch.compile.
        """
        self.model = model
        self.ids, self.labels = batch_of(point, device)
        self.embed: nn.Module = model.get_input_embeddings()
        self.loss = compiled_loss(name, backend) if point.compiled else loss_of
        self.parameters = trainable(model)
        # As transformers' Trainer has it by default: one kernel, or one per tensor on a CPU.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, fused=True)
        self.autocast = torch.autocast(
            device, dtype=torch.bfloat16, enabled=point.precision.autocast
        )

    @property
    def trainable(self) -> int:
        """How many numbers train."""
        return sum(parameter.numel() for parameter in self.parameters)

    def kept_bytes(self) -> int:
        """What lives from step to step: weights, the base's among them, and AdamW's moments."""
        moments = [its for state in self.optimizer.state.values() for its in state.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *moments]
        storages = [its.untyped_storage() for its in tensors if isinstance(its, torch.Tensor)]
        return sum({its.data_ptr(): its.nbytes() for its in storages}.values())

    def __call__(self) -> torch.Tensor:
        """Take a step and return its loss."""
        with self.autocast:
            loss = self.loss(self.model, self.embed(self.ids), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def make_step(
    name: str, base: Any, point: Point, device: str = "cpu", backend: str = "inductor"
) -> Step:
    """A method's step on a base that it shares with the others."""
    return Step(name, build(name, base, point), point, device, backend)
