"""What the optimiser gets: every parameter that trains, at its own learning rate and decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import Trainer

from msplora.errors import ConfigError
from msplora.store import B, factors

from .levels import check_level_names

# Of other methods too, so that they can be compared under the same factors.
_NAMES_OF_B = (
    B,
    "lora_B",
    "lora_embedding_B",
    "hydra_parallel_B",
    "hydra_sequential_B",
    "elalora_B",
    "gralora_B",
    "gralora_B_general",
)


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    level_factors: Mapping[str, float] | None = None,
    b_factor: float = 1.0,
    head_factor: float = 1.0,
    head: Iterable[str] | None = None,
    adapter_name: str = "default",
) -> list[dict[str, Any]]:
    """Return the groups of an optimiser over everything in the model that trains.

    ::

        groups = parameter_groups(model, 3e-4, level_factors={"local": 2.0}, b_factor=16.0)
        Trainer(model, …, optimizers=(torch.optim.AdamW(groups), None))    # TRL's trainers too

    The factors multiply: B of the local level gets 3e-4 · 2 · 16 here. Parameters that end up with
    the same rate and decay are one group.

    Args:
        model: with an MSPLoRA adapter or PEFT's plain LoRA, or without any; under FSDP or
            DeepSpeed the wrapped one.
        learning_rate: of a factor of 1.
        weight_decay: of all but biases and the weights of norms.
        level_factors: level → its rate over `learning_rate`; 1 for a level that is not named.
        b_factor: the rate of every B over that of its A (LoRA+, arXiv 2402.12354: about 16).
        head_factor: of the modules in `head`.
        head: names of modules of the base model, such as a classifier; unset, all that PEFT trains
            in full beside the adapter (`modules_to_save`).
        adapter_name: whose levels.

    Raises:
        ConfigError: a level that the pyramid does not have, or a factor that is not above 0.
        MSPLoraError: `level_factors` of a model without this MSPLoRA adapter.
    """
    level_factors = dict(level_factors or {})
    _check_factors({**level_factors, "b_factor": b_factor, "head_factor": head_factor})
    levels = _level_of(model, adapter_name) if level_factors else {}
    check_level_names(level_factors, set(levels.values()), "level_factors")
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # pyright: ignore
    heads = None if head is None else tuple(f"{name}." for name in head)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # The wrappers of PEFT, DDP and FSDP put their names in front.
        inner = name.removeprefix("module.").removeprefix("base_model.model.")
        factor = level_factors.get(levels.get(id(parameter), ""), 1.0)
        if ".modules_to_save." in name if heads is None else inner.startswith(heads):
            factor *= head_factor
        elif any(f".{part}." in name for part in _NAMES_OF_B):
            factor *= b_factor
        groups.setdefault((factor, name in decayed), []).append(parameter)
    # Those at `learning_rate` first: a trainer logs the rate of the first group.
    order = sorted(groups, key=lambda its: (its[0] != 1.0, its))
    return [
        {
            "params": groups[factor, decays],
            "lr": learning_rate * factor,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for factor, decays in order
    ]


def _level_of(model: nn.Module, adapter_name: str) -> dict[int, str]:
    """The level that each parameter of the pyramid belongs to, by the parameter's identity."""
    return {
        id(parameter): address.partition("/")[0]
        for address, (a, b, _) in factors(model, adapter_name).items()
        for parameter in (a, b)
    }


def _check_factors(given: Mapping[str, float]) -> None:
    for name, factor in given.items():
        if not factor > 0:
            raise ConfigError(
                f"the learning-rate factor of {name} is {factor}; a factor is above 0. To keep a "
                f"level from training, freeze it."
            )
