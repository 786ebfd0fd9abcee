"""Two processes on the CPU: their gradients are those of one process.

Each test starts this file twice with torch's launcher; `main` below is what a process runs.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from peft import get_peft_model
from torch import Tensor, nn

import msplora

BATCH = 4


def model_of(**changes: Any) -> Any:
    from oracle import randomise
    from tiny import llama

    torch.manual_seed(0)
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"]} | changes
    model = get_peft_model(llama(4), msplora.MSPLoraConfig(**options))
    randomise(model)
    return model.train()


def batch_of(rank: int | None = None) -> Tensor:
    """The rows of one process, or all of them."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 60, (2 * BATCH, 7), generator=generator)
    return ids if rank is None else ids[rank * BATCH : (rank + 1) * BATCH]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        gradient: Any = parameter.grad
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        found[name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")] = gradient
    return found


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def check(model: nn.Module, rank: int, **changes: Any) -> None:
    """One backward pass on this process's rows against one process with all rows."""
    alone = model_of(**changes)
    expected_loss = loss_of(alone, batch_of())
    expected_loss.backward()
    expected = gradients_of(alone)
    loss = loss_of(model, batch_of(rank))
    loss.backward()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    assert torch.allclose(total / 2, expected_loss, atol=1e-5)
    found = gradients_of(model)
    assert set(found) == set(expected)
    assert len(expected) == 2 * (3 * (1 + 3 + 4))
    for name, gradient in found.items():
        assert bool(expected[name].any()), name
        assert torch.allclose(gradient, expected[name], atol=1e-5, rtol=1e-4), name


def ddp(rank: int) -> None:
    check(nn.parallel.DistributedDataParallel(model_of()), rank)


def ddp_holds_a_copy_of_the_gradients(rank: int) -> None:
    """What a dry run counts for DDP, beyond one process."""
    from msplora.bench.memory import peak_live_bytes

    def steps(model: nn.Module) -> None:
        for _ in range(3):  # DDP makes its buckets anew in the second
            loss_of(model, batch_of(rank)).backward()
            model.zero_grad()

    model = model_of()
    size = sum(its.nbytes for its in model.parameters() if its.requires_grad)
    alone = peak_live_bytes(lambda: steps(model))
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert peak_live_bytes(lambda: steps(wrapped)) - alone == pytest.approx(size, abs=4096)


def checkpointed(use_reentrant: bool) -> Any:
    model = model_of()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return model


def ddp_with_checkpointing(rank: int) -> None:
    check(nn.parallel.DistributedDataParallel(checkpointed(False)), rank)


def ddp_with_reentrant_checkpointing(rank: int) -> None:
    """A shared pair is used in several segments, each of which marks its gradient as ready."""
    model = nn.parallel.DistributedDataParallel(checkpointed(True))
    with pytest.raises(RuntimeError, match="mark a variable ready only once"):
        loss_of(model, batch_of(rank)).backward()


def ddp_with_reentrant_checkpointing_and_static_graph(rank: int) -> None:
    check(nn.parallel.DistributedDataParallel(checkpointed(True), static_graph=True), rank)


def sharded(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def fsdp2(rank: int) -> None:
    check(sharded(model_of()), rank)


def fsdp2_with_checkpointing(rank: int) -> None:
    check(sharded(checkpointed(False)), rank)


def fsdp2_saves_and_loads(rank: int) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    from oracle import same_tensors, tensors_of

    whole = model_of()
    model = sharded(copy.deepcopy(whole))
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        state_dict = get_peft_model_state_dict(whole, state_dict=full)
        other = model_of()
        with torch.no_grad():
            for a, b, _ in msplora.factors(other).values():
                a.zero_()
                b.zero_()
        set_peft_model_state_dict(other, state_dict)
        assert same_tensors(tensors_of(other), tensors_of(whole))


def fsdp1(rank: int) -> None:
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = model_of()
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "LlamaDecoderLayer"
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    alone = model_of()
    expected = loss_of(alone, batch_of(rank))
    loss = loss_of(wrapped, batch_of(rank))
    assert torch.allclose(loss, expected, atol=1e-5)
    loss.backward()
    optimizer = torch.optim.SGD([its for its in wrapped.parameters() if its.requires_grad], lr=0.5)
    optimizer.step()
    loss_of(alone, batch_of()).backward()
    torch.optim.SGD([its for its in alone.parameters() if its.requires_grad], lr=0.5).step()
    after = loss_of(wrapped, batch_of(rank))
    assert torch.allclose(after, loss_of(alone, batch_of(rank)), atol=1e-4)
    assert abs(float(after - expected)) > 1e-2  # the step changed something


CASES: dict[str, Callable[[int], None]] = {
    function.__name__: function
    for function in (
        ddp,
        ddp_holds_a_copy_of_the_gradients,
        ddp_with_checkpointing,
        ddp_with_reentrant_checkpointing,
        ddp_with_reentrant_checkpointing_and_static_graph,
        fsdp2,
        fsdp2_with_checkpointing,
        fsdp2_saves_and_loads,
        fsdp1,
    )
}


BY_HAND = {
    "fsdp2",
    "ddp_holds_a_copy_of_the_gradients",
    "ddp_with_checkpointing",
    "ddp_with_reentrant_checkpointing",
    "ddp_with_reentrant_checkpointing_and_static_graph",
    "fsdp1",
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(its, marks=pytest.mark.thorough if its in BY_HAND else pytest.mark.slow)
        for its in CASES
    ],
)
def test_two_processes(case: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, __file__, case],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count(f"{case}: right") == 2


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    case = sys.argv[1]
    CASES[case](torch.distributed.get_rank())
    print(f"{case}: right", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
