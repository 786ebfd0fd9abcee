"""The updates in the file of a plain LoRA: every site has a pair of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from msplora.errors import AdapterFileError, BaseModelError, UnsupportedError
from msplora.matching import pattern_matches, place
from msplora.pyramid import Level, Shape, Site, arrange
from msplora.spectrum import as_matrices

from .base import Base
from .on_disk import TensorsOnDisk
from .stored import StoredKind, StoredPair, StoredSite

LORA_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
"""The name of a factor: its site, and which of the two it is."""


def lora_kinds(tensors: TensorsOnDisk, config: Any, base: Base | None) -> tuple[StoredKind, ...]:
    """Sort a LoRA's pairs into kinds; raises as `read_adapter`."""
    pairs: dict[str, StoredPair] = {}
    for key, names in _factors(tensors).items():
        a, b = (tensors.shapes[name] for name in names)
        scale = scale_of(config, key)
        for number, (name, a_RI, b_OR) in enumerate(_as_sites(key, a, b, config)):
            fit = a_RI.ndim == b_OR.ndim == 2 and a_RI.shape[0] == b_OR.shape[1]
            if not fit:
                raise AdapterFileError(
                    f"{tensors.path}: A {tuple(a.shape)} and B {tuple(b.shape)} of {key!r} have no "
                    f"product B A. The file is damaged, or no LoRA's."
                )
            read = partial(_read_site, tensors, key, names, config, number)
            rank, in_features = a_RI.shape
            pairs[name] = StoredPair("lora", 0, scale(rank), rank, in_features, b_OR.shape[0], read)
    if base is not None:
        _check_fit(pairs, base, tensors.path)
    sites = []
    for key, pair in pairs.items():
        stack, block, kind = place_of(key, config, base)
        shape = Shape("linear", pair.out_features, pair.in_features)
        sites.append(Site(key, stack, kind, block, shape))
    # The level is only there to have the kinds named and ordered as a plan's are.
    kinds = arrange(sites, [Level("lora", rank=1, groups=0, alpha=1)]).kinds
    return tuple(
        StoredKind(
            kind.name,
            tuple(replace(pairs[site.key], group=depth) for depth, site in enumerate(kind.sites)),
            tuple(
                StoredSite(site.key, site.block, (depth,)) for depth, site in enumerate(kind.sites)
            ),
        )
        for kind in kinds
    )


def _factors(tensors: TensorsOnDisk) -> dict[str, tuple[str, str]]:
    """Site → the names of its A and its B."""
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = LORA_TENSOR.fullmatch(name)
        if match:
            found.setdefault(match.group(1), {})[match.group(2)] = name
        elif ".lora_" in name and not name.endswith(".bias"):
            raise UnsupportedError(
                f"{tensors.path} holds {name!r}, which is no factor of a plain LoRA: its update is "
                f"not s B A alone. Adapters of LoRA and MSPLoRA, without DoRA, are analysed."
            )
    alone = [f"{key}: only {next(iter(its))}" for key, its in found.items() if len(its) < 2]
    if alone or not found:
        what = f"half of a pair, {alone[0]}" if alone else "no pair of a LoRA"
        raise AdapterFileError(
            f"{tensors.path} holds {what}. The file is not whole; save or copy the adapter again."
        )
    return {key: (its["A"], its["B"]) for key, its in found.items()}


def _read_site(
    tensors: TensorsOnDisk, key: str, names: tuple[str, str], config: Any, number: int
) -> tuple[Tensor, Tensor]:
    """One of the matrices that a pair of tensors holds."""
    a, b = (tensors[name] for name in names)
    return _as_sites(key, a, b, config)[number][1:]


def scale_of(config: Any, key: str) -> Any:
    """From the rank of a site to its scale: alpha / rank; rank-stabilised, alpha / sqrt(rank)."""
    alpha = config.lora_alpha
    for pattern, value in (config.alpha_pattern or {}).items():
        if pattern_matches(pattern, key):
            alpha = value
            break
    return lambda rank: alpha / (math.sqrt(rank) if config.use_rslora else rank)


def rank_of(config: Any, key: str) -> int:
    """The rank that a LoRA's config asks for at a site."""
    for pattern, value in (config.rank_pattern or {}).items():
        if pattern_matches(pattern, key):
            return value
    return config.r


def _as_sites(key: str, a: Tensor, b: Tensor, config: Any) -> list[tuple[str, Tensor, Tensor]]:
    """A site's factors as matrices; experts, whose weights are one parameter, each as a site."""
    rank = rank_of(config, key)
    experts = len(a) // rank if a.ndim == 2 and getattr(config, "target_parameters", None) else 1
    if experts > 1 and len(a) == experts * rank and b.shape[-1] == len(a):
        stacked = as_matrices(a, b, experts=experts)
        return [
            (f"{key}[expert {place_}]", a_RI, b_OR)
            for place_, (a_RI, b_OR) in enumerate(zip(*stacked, strict=True))
        ]
    groups = len(a) // b.shape[1] if a.ndim > 2 and b.ndim == a.ndim else 1
    return [(key, *as_matrices(a, b, groups=groups))]


def place_of(key: str, config: Any, base: Base | None) -> tuple[str, int | None, str]:
    """The stack, the block's number and the kind; without the base, by the outermost number."""
    if base is not None:
        path = key.partition("[")[0]
        stack, block, kind = place(base.model, path, config.layers_pattern)
        return stack, block, kind + key[len(path) :]
    names = key.split(".")
    numbers = [at for at, name in enumerate(names) if name.isdigit()]
    if not numbers:
        return key, None, key
    at = numbers[0]
    return ".".join(names[:at]), int(names[at]), ".".join(names[at + 1 :]) or "self"


def _check_fit(pairs: Mapping[str, StoredPair], base: Base, where: Path) -> None:
    for key, pair in pairs.items():
        path = key.partition("[")[0].replace(".base_layer", "")
        shape = pair.out_features, pair.in_features
        module = base.module(path)
        found = module is not None
        # Of convolutions and experts it is enough that they are there.
        if isinstance(module, nn.Linear):
            found = tuple(module.weight.shape) == shape
        if not found:
            its = "" if module is None else f" of shape {tuple(module.weight.shape)}"
            raise BaseModelError(
                f"the base {base.source!r} does not match {where}: that adapts {path!r} of shape "
                f"{shape}, and the base has {'no such weight' if module is None else 'it' + its}. "
                f"Pass the model that the adapter was made for."
            )
