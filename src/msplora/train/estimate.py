"""How much memory a run takes, found by rehearsing it on tensors without storage."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import TrainerCallback

from .as_on_cuda import as_on_cuda, steps_at_once
from .dry_run_devices import has_buckets
from .job import Job
from .memory_trace import Held, MemoryTrace, Peak
from .quantisation import is_quantised
from .rehearsal import Rehearsal, Rows, kept_between_steps, rehearsed, weights_of
from .weightless import taken_for_real, weightless_copy

CUDA_ROUNDING = 512
"""Bytes: the unit of PyTorch's allocator for CUDA."""


@dataclass(frozen=True)
class Estimate:
    """The peaks of a step on the longest rows, and of an evaluation of the longest rows."""

    training: Peak
    evaluation: Peak | None
    rows: Rows

    @property
    def peak(self) -> Peak:
        """The higher of the two."""
        return max(self.training, self.evaluation or Peak(), key=lambda peak: peak.total)


def estimate(job: Job, on_gpu: bool, arithmetic: torch.dtype | None = None) -> Estimate:
    """Let the trainer of a job take its dearest steps on tensors without storage.

    Args:
        job: prepared on the meta device. Its settings may have been changed since then where they
            only matter to the trainer.
        on_gpu: as on a CUDA GPU, whether there is one here or not; else as on the CPU.
        arithmetic: compute in this dtype instead of the job's.
    """
    arithmetic = arithmetic or job.base.arithmetic
    # As wide, and accelerate would want to see a GPU for the other.
    arithmetic = torch.bfloat16 if arithmetic == torch.float16 else arithmetic
    frozen = {torch.float16: torch.bfloat16}
    # What of a quantised base is not rounded stays in float32.
    if arithmetic == torch.bfloat16 and not is_quantised(job.base.model):
        frozen[torch.float32] = torch.bfloat16
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = weightless_copy(job.adapted.model, fake, frozen)
    trace = MemoryTrace(
        fake,
        logits=_widths_of_logits(model),
        rounding=CUDA_ROUNDING if on_gpu else 1,
        workspace=gpu_workspace if on_gpu else cpu_workspace,
    )
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, ACCELERATE_USE_CPU="true"))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.object(job.adapted, "model", model))
        stack.enter_context(mock.patch.object(job.base, "arithmetic", arithmetic))
        stack.enter_context(rehearsed(job.record.settings))
        stack.enter_context(fake)
        stack.enter_context(trace)
        stack.enter_context(taken_for_real())
        if on_gpu:
            stack.enter_context(as_on_cuda())
        trainer = job.make_trainer(Path(folder))
        for tensor in weights_of(trainer):
            trace.hold(tensor, Held.TRAINED if tensor.requires_grad else Held.FROZEN)
        if has_buckets(job.record.settings.devices):
            trained = [its for its in model.parameters() if its.requires_grad]
            buckets = torch.empty(sum(its.nbytes for its in trained), dtype=torch.uint8)
            trace.hold(buckets, Held.BUCKETS)
        trainer.args.dataloader_pin_memory = False
        if on_gpu:
            steps_at_once(trainer.create_optimizer())
        trainer.add_callback(_OptimiserWatched(trace))  # before those that step beside it
        rehearsal = Rehearsal(trainer)
        stack.enter_context(_gradients_noted(trace, model))
        trace.start_anew()
        rehearsal.train()
        training = trace.start_anew()
        evaluation = None
        if rehearsal.evaluates:
            rehearsal.evaluate()
            evaluation = replace(trace.start_anew(), where="evaluation")
    return Estimate(training, evaluation, rehearsal.rows)


class _OptimiserWatched(TrainerCallback):
    """Tells a trace when the optimiser is at work, and what is kept for its next step."""

    def __init__(self, trace: MemoryTrace) -> None:
        self.trace = trace

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin a step; what methods do beside it is part of it."""
        self.trace.stepping = True

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **others: Any
    ) -> None:
        """End it."""
        self.trace.stepping = False
        for tensor in kept_between_steps(model, others["optimizer"]):
            self.trace.hold(tensor, Held.OPTIMISER)


@contextmanager
def _gradients_noted(trace: MemoryTrace, model: nn.Module) -> Iterator[None]:
    """Tell a trace which tensors are gradients."""

    def note_gradient(parameter: Tensor) -> None:
        if parameter.grad is not None:
            trace.hold(parameter.grad, Held.GRADIENTS)

    handles = [
        parameter.register_post_accumulate_grad_hook(note_gradient)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widths_of_logits(model: Any) -> set[int]:
    """The width of a language model's logits, and of the parts that TRL computes them in."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None:
        return set()
    vocabulary = weight.shape[0]
    part = getattr(sys.modules.get("trl.trainer.utils"), "_CHUNKED_LOGPROB_CHUNK_SIZE", None)
    return {vocabulary, part, vocabulary % part} if part else {vocabulary}


def gpu_workspace(func: Any, args: tuple[Any, ...]) -> int:
    """The bytes that a kernel of bitsandbytes takes for itself while it runs.

    Of 4 bits, the weights as they were before (on a GPU it does without for a few rows, and which,
    depends on the card); of 8 bits, the product in whole numbers.
    """
    name = _of_bitsandbytes(func)
    if name == "gemm_4bit":
        inputs, _, shape = args[:3]
        return inputs.dtype.itemsize * math.prod(shape)
    return 4 * _numbers_of_8_bits(args) if name == "int8_scaled_mm" else 0


def cpu_workspace(func: Any, args: tuple[Any, ...]) -> int:
    """The bytes that a kernel on the CPU takes for itself while it runs.

    Of PyTorch's arithmetic between dtypes: tensors of another dtype than the result's are converted
    whole. So bitsandbytes holds a product of 8 bits in whole numbers, the same in float32, and its
    scales, beside the result.
    """
    if _of_bitsandbytes(func) == "int8_scaled_mm":
        return 12 * _numbers_of_8_bits(args)
    if func.overloadpacket not in _ARITHMETIC:
        return gpu_workspace(func, args)
    tensors = [its for its in args if isinstance(its, Tensor)]
    if len({its.dtype for its in tensors}) < 2:
        return 0
    common = torch.result_type(*tensors[:2])
    return common.itemsize * sum(
        its.numel() for its in tensors if its.dtype != common and its.dim()
    )


def _of_bitsandbytes(func: Any) -> str:
    return func.overloadpacket.__name__ if func.namespace == "bitsandbytes" else ""


def _numbers_of_8_bits(args: tuple[Any, ...]) -> int:
    """How many numbers the product of (… tokens, I) and (O, I) has."""
    inputs, weights = args[:2]
    return math.prod(inputs.shape[:-1]) * weights.shape[0]


_ARITHMETIC = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_")
)
