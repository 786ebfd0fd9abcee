"""The parameters of a pyramid by level, for everything that treats the levels differently."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from msplora.errors import ConfigError, nearest
from msplora.store import factors


def level_parameters(
    model: nn.Module, adapter_name: str = "default"
) -> dict[str, list[nn.Parameter]]:
    """Level → the A and the B of its pairs, each once; levels in the pyramid's order.

    Raises:
        MSPLoraError: the model has no such MSPLoRA adapter.
    """
    found: dict[str, list[nn.Parameter]] = {}
    for address, (a, b, _) in factors(model, adapter_name).items():
        found.setdefault(address.partition("/")[0], []).extend((a, b))
    return found


def freeze_levels(model: nn.Module, levels: Iterable[str], adapter_name: str = "default") -> None:
    """Let no pair of these levels train. PEFT thaws them where it loads or activates an adapter.

    Raises:
        ConfigError: the pyramid has no such level, or no other.
        MSPLoraError: the model has no such MSPLoRA adapter.
    """
    by_level = level_parameters(model, adapter_name)
    levels = list(levels)
    check_level_names(levels, by_level, "frozen_levels")
    check_some_train(levels, by_level)
    for level in levels:
        for parameter in by_level[level]:
            parameter.requires_grad_(False)


def check_some_train(frozen: Iterable[str], known: Iterable[str]) -> None:
    """Refuse to freeze all there is.

    Raises:
        ConfigError: no level is left.
    """
    frozen = list(frozen)
    if set(known) <= set(frozen):
        raise ConfigError(
            f"frozen_levels = {frozen} leaves no level of the pyramid to train. Leave one out."
        )


def check_level_names(asked: Iterable[str], known: Iterable[str], key: str) -> None:
    """Refuse a level that the pyramid does not have; `key` is what named it.

    Raises:
        ConfigError: there is one.
    """
    known = list(known)
    for level in asked:
        if level not in known:
            raise ConfigError(
                f"{key} names the level {level!r}, and the pyramid has {', '.join(known)}."
                + nearest(level, known, count=1)
            )


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP has sharded, gathered."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore


def have_numbers(tensors: Sequence[Tensor]) -> list[bool]:
    """Which tensors hold something else than zeros; of a sharded one, the shards of all processes.

    All in one exchange: to gather each would take as many as there are tensors.
    """
    if not tensors:
        return []
    here = [its.to_local() if hasattr(its, "to_local") else its for its in tensors]  # pyright: ignore
    found = torch.stack([its.any() for its in here]).int()
    if any(mine is not its for mine, its in zip(here, tensors, strict=True)):
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return found.bool().tolist()
