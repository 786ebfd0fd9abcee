"""Parameters that are adapted by themselves, without a layer around them (`target_parameters`)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from . import _peft
from .blocks import place, wanted_blocks
from .errors import TargetError
from .pyramid import Shape


def own_parameters(module: nn.Module) -> list[str]:
    """The names of a module's own parameters, also of those that a parametrisation computes."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    computed: Any = module.parametrizations if is_parametrized(module) else ()
    return [*names, *computed]


def targeted_parameters(
    path: str, module: nn.Module, wanted: Collection[str]
) -> Iterator[tuple[str, Shape]]:
    """The key and shape of each parameter of `module` that `wanted` names, whole or by its end."""
    for name in own_parameters(module):
        key = f"{path}.{name}" if path else name
        if any(key == its or key.endswith(f".{its}") for its in wanted):
            _check_that_peft_wraps_it(path, module, name, wanted)
            yield key, shape_of(module, key, name)


def experts_named_as_modules(modules: Mapping[str, nn.Module], pattern: str) -> list[str]:
    """The stacked experts that a regular expression for modules matches: they are parameters."""
    return [
        f"{path}.{name}"
        for path, module in modules.items()
        for name, parameter in _peft.unwrapped(module).named_parameters(recurse=False)
        if parameter.ndim == 3 and re.fullmatch(pattern, f"{path}.{name}")
    ]


def check_none_left_out(model: nn.Module, config: Any, keys: Sequence[str]) -> None:
    """Refuse to adapt parameters that `exclude_modules` or `layers_to_transform` leaves out.

    PEFT goes by neither where it adapts parameters, so they would train all the same.

    Args:
        model: the base.
        config: the adapter's.
        keys: of all that `target_parameters` matches.

    Raises:
        TargetError: one of them is left out.
    """
    wanted = wanted_blocks(config)
    left_out = {}
    for key in keys:
        if any(_peft.is_excluded(config, its) for its in (key, key.rpartition(".")[0])):
            left_out[key] = "exclude_modules"
        elif wanted is not None:
            block = place(model, key, config.layers_pattern)[1]
            in_full = block is None and key in config.target_parameters
            if block not in wanted and not in_full:
                left_out[key] = "layers_to_transform"
    if left_out:
        key, field = next(iter(left_out.items()))
        kept = [key for key in keys if key not in left_out]
        advice = f"Name in full what to adapt, as {kept[0]!r}" if kept else "Adapt no parameter"
        raise TargetError(
            f"target_parameters matches {key!r}, which {field} = {getattr(config, field)!r} leaves "
            f"out; but that goes for modules only, and PEFT adapts the parameter all the same. "
            f"{advice}, or leave {field} out."
        )


def _check_that_peft_wraps_it(
    path: str, module: nn.Module, name: str, wanted: Collection[str]
) -> None:
    if not path:
        raise TargetError(
            f"Targeting an nn.Parameter on the top-level module is not supported (parameter "
            f"{name!r}): PEFT would have to wrap the model in itself. Move it into a module."
        )
    key = f"{path}.{name}"
    if is_parametrized(module) and key not in wanted:
        raise TargetError(
            f"target_parameters matches {key!r}, whose module is parametrised; there PEFT finds "
            f"only what is named in full. Name {key!r}."
        )


def shape_of(module: nn.Module, key: str, name: str) -> Shape:
    """The shape of one parameter of a module.

    Raises:
        TargetError: it has neither two nor three dimensions.
    """
    parameter = getattr(module, name)
    if parameter.ndim not in (2, 3):
        raise TargetError(
            f"target_parameters matches {key!r}, which has {parameter.ndim} dimensions; "
            f"parameters of 2 (a weight) or 3 (experts) can be adapted."
        )
    experts, out_features, in_features = _peft.parameter_shape(module, name)
    return Shape("experts", out_features, in_features, blocks=experts)
