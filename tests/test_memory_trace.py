"""Bytes are followed as an allocator follows them, on the CPU and as on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from msplora.bench.memory import peak_live_bytes
from msplora.errors import UnsupportedError
from msplora.train.as_on_cuda import as_on_cuda
from msplora.train.estimate import cpu_workspace
from msplora.train.memory_trace import Held, MemoryTrace


def traced(**options: Any) -> tuple[FakeTensorMode, MemoryTrace]:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    return fake, MemoryTrace(fake, **options)


def test_bytes_are_counted_until_they_are_let_go() -> None:
    fake, trace = traced()
    with fake, trace:
        kept = torch.zeros(100)
        gone = kept + 1
        assert gone is not kept
        del gone
        view = kept[:10]  # no bytes of its own
    assert trace.peak.total == 800
    assert trace.start_anew().parts == {Held.ACTIVATIONS: 800}
    assert trace.peak.total == 400
    del kept
    assert trace.start_anew().total == 400
    del view
    trace.start_anew()
    assert trace.peak.total == 0


def test_what_autograd_keeps_is_counted() -> None:
    fake, trace = traced()
    with fake, trace:
        x = torch.zeros(100, requires_grad=True)
        y = x.exp()  # keeps its result
        del y
        trace.start_anew()
        assert trace.peak.total == 400
        z = x.exp().sum()
        trace.start_anew()
        assert trace.peak.total == 400 + 400 + 4
        z.backward()
        assert trace.peak.where == "backward"


def test_an_allocator_rounds() -> None:
    fake, trace = traced(rounding=512)
    with fake, trace:
        assert len(torch.zeros(1)) == 1
    assert trace.peak.total == 512


def test_whole_numbers_of_the_batch_are_known() -> None:
    labels = torch.tensor([[-100, 3, 4], [-100, -100, 5]])
    fake, trace = traced()
    with fake, trace:
        logits = torch.zeros(2, 3, 7)
        counted = labels != -100
        assert counted.sum().item() == 3
        assert not counted.all()
        assert logits[counted].shape == (3, 7)
        assert torch.masked_select(logits, counted[..., None]).shape == (21,)
        assert counted.nonzero().shape == (3, 2)
        counted.logical_and_(logits[..., 0] > 0)  # now nobody knows
        with pytest.raises(UnsupportedError, match="depends on numbers"):
            logits[counted].sum()


def test_kernels_of_the_cpu_take_what_the_profiler_sees() -> None:
    x, mask, half = torch.ones(64, 64), torch.ones(64, 64, dtype=torch.bool), torch.ones(64, 64)
    half = half.bfloat16()
    mul, add_ = torch.ops.aten.mul.Tensor, torch.ops.aten.add_.Tensor
    assert peak_live_bytes(lambda: x * mask) == x.nbytes + cpu_workspace(mul, (x, mask))
    assert peak_live_bytes(lambda: x * x) == x.nbytes + cpu_workspace(mul, (x, x))
    assert cpu_workspace(mul, (x, x)) == 0 < cpu_workspace(mul, (x, mask))
    assert peak_live_bytes(lambda: x.add_(half)) == cpu_workspace(add_, (x, half)) > 0


class Attention(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, mask, dropout_p=0.1)


def attended(length: int, dtype: torch.dtype, masked: bool, gpu: bool) -> int:
    """The peak of attention and its backward over so many tokens."""
    fake, trace = traced()
    with fake, trace:
        x = torch.zeros(2, 4, length, 16, dtype=dtype, requires_grad=True)
        mask = torch.ones(2, 1, length, length, dtype=torch.bool) if masked else None
        if gpu:
            with as_on_cuda():
                Attention()(x, mask).sum().backward()
        else:
            Attention()(x, mask).sum().backward()
    return trace.peak.total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_gpu_keeps_no_probabilities(dtype: torch.dtype) -> None:
    short, long = (attended(length, dtype, False, gpu=True) for length in (256, 1024))
    assert long < 4.2 * short
    assert attended(1024, dtype, False, gpu=False) > 3 * long  # on a CPU dropout needs them
    # Of a mask there is one for all heads.
    masked = (attended(1024, dtype, True, gpu=True) - long) / (2 * 1024 * 1024)
    assert masked == pytest.approx(1 + dtype.itemsize, rel=0.01)


def test_dropout_on_a_gpu_keeps_truth_values() -> None:
    fake, trace = traced()
    with fake, trace, as_on_cuda():
        x = torch.zeros(1000, requires_grad=True)
        y = F.dropout(x, 0.1)
        trace.start_anew()
    assert trace.peak.total == 4000 + 4000 + 1000
    assert y.requires_grad


def test_autocast_on_a_gpu_normalises_in_float32() -> None:
    fake, trace = traced()
    with fake, trace, as_on_cuda(), torch.autocast("cpu", torch.bfloat16):
        x = torch.zeros(2, 8, dtype=torch.bfloat16)
        assert F.layer_norm(x, (8,)).dtype == torch.float32
        assert F.softmax(x, -1).dtype == torch.float32
        assert F.linear(x.float(), torch.zeros(8, 8)).dtype == torch.bfloat16
        heads = torch.zeros(1, 1, 8, 8)
        attended = F.scaled_dot_product_attention(heads, heads, heads)
        assert attended.dtype == torch.bfloat16
