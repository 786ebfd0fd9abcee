"""The sharing survives copies, casts and reloads; training reaches every pair."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

import msplora
from adapted_llama import (
    BATCH,
    LLAMA,
    adapted,
    close,
    config,
    logits,
    step,
)
from oracle import (
    Untied,
    assert_shared,
    plan_of,
    randomise,
    same_tensors,
    tensors_of,
)

# Copies and casts


def roads() -> dict[str, Callable[[Any, Path], Any]]:
    def reload(model: Any, folder: Path, **options: Any) -> Any:
        model.save_pretrained(folder)
        return PeftModel.from_pretrained(LLAMA.model(), folder, is_trainable=True, **options)

    def state_dict(model: Any, folder: Path) -> Any:
        other = adapted()
        other.load_state_dict(model.state_dict())
        return other

    def whole(model: Any, folder: Path) -> Any:
        torch.save(model, folder / "model.pt")
        return torch.load(folder / "model.pt", weights_only=False)

    def again(model: Any, folder: Path) -> Any:
        kept = tensors_of(model)
        other = get_peft_model(model.unload(), config())
        with torch.no_grad():
            for address, (a, b, _) in msplora.factors(other).items():
                a.copy_(kept[address][0])
                b.copy_(kept[address][1])
        return other

    return {
        "deepcopy": lambda model, folder: copy.deepcopy(model),
        "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
        "torch.save": whole,
        "state_dict": state_dict,
        "reload": reload,
        "reload with low memory": lambda model, folder: reload(
            model, folder, low_cpu_mem_usage=True
        ),
        "unload and wrap again": again,
        "double and back": lambda model, folder: model.double().float(),
        "to device and dtype": lambda model, folder: model.to("cpu", torch.float64).float(),
    }


@pytest.mark.parametrize("road", roads())
def test_the_sharing_survives(road: str, tmp_path: Path) -> None:
    model = adapted()
    expected, kept = logits(model), tensors_of(model)
    other = roads()[road](model, tmp_path).eval()
    assert same_tensors(tensors_of(other), kept)
    assert_shared(other, plan_of(other))
    assert torch.equal(logits(other), expected)
    step(other)
    assert_shared(other, plan_of(other))
    assert close(logits(other), Untied(LLAMA.model(), other, plan_of(other))(**BATCH).logits)


def test_a_deep_copy_shares_nothing_with_the_original() -> None:
    model = adapted()
    expected = logits(model)
    other = copy.deepcopy(model)
    step(other)
    randomise(other, seed=12)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(other), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casting_the_model(dtype: torch.dtype) -> None:
    model = adapted().to(dtype)
    assert_shared(model, plan_of(model))
    assert {a.dtype for a, _, _ in msplora.factors(model).values()} == {dtype}
    step(model)
    assert_shared(model, plan_of(model))


def test_the_state_dict_lists_every_number_once() -> None:
    model = adapted()
    adapter = {key: its for key, its in model.state_dict().items() if "msplora_" in key}
    assert sum(tensor.numel() for tensor in adapter.values()) == plan_of(model).parameters
    assert len({tensor.data_ptr() for tensor in adapter.values()}) == len(adapter)
    # `get_parameter` finds them by the names the state dict shows.
    assert all(torch.equal(model.get_parameter(key), its) for key, its in adapter.items())


# Training


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant: bool) -> None:
    plain, checkpointed = adapted(), adapted()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        model.train()
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    expected = msplora.factors(plain)
    for address, (a, b, _) in msplora.factors(checkpointed).items():
        assert close(a.grad, expected[address][0].grad)
        assert close(b.grad, expected[address][1].grad)


def compiled_agrees(backend: str) -> None:
    torch._dynamo.reset()
    model = adapted()
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert close(compiled(**BATCH, use_cache=False).logits, expected)
    loss = compiled(**BATCH, use_cache=False).logits.pow(2).mean()
    loss.backward()
    gradients = {key: a.grad.clone() for key, (a, _, _) in msplora.factors(model).items()}
    model.zero_grad()
    model(**BATCH).logits.pow(2).mean().backward()
    for address, (a, _, _) in msplora.factors(model).items():
        assert close(gradients[address], a.grad, 1e-4)


@pytest.mark.slow
def test_torch_compile_without_graph_breaks() -> None:
    compiled_agrees("eager")


@pytest.mark.thorough
def test_torch_compile_with_inductor() -> None:
    compiled_agrees("inductor")


def test_dropout_acts_in_training_only() -> None:
    model = adapted(lora_dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_loraplus_puts_every_b_into_the_fast_group() -> None:
    from peft.optimizers import create_loraplus_optimizer

    model = adapted(random=False)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.0
    )
    rate = {id(its): group["lr"] for group in optimizer.param_groups for its in group["params"]}
    for a, b, _ in msplora.factors(model).values():
        assert (rate[id(a)], rate[id(b)]) == pytest.approx((1e-3, 16e-3))
    assert len(rate) == 2 * len(msplora.factors(model))
