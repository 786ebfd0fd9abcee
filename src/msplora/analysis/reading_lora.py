"""The updates in the file of a plain LoRA: every site has a pair of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from msplora.errors import AdapterFileError, BaseModelError, UnsupportedError
from msplora.matching import pattern_matches, place
from msplora.pyramid import Level, Shape, Site, arrange
from msplora.spectrum import as_matrices

from .base import Base
from .stored import StoredKind, StoredPair, StoredSite

LORA_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
"""The name of a factor: its site, and which of the two it is."""


def lora_kinds(
    tensors: Mapping[str, Tensor], config: Any, where: str, base: Base | None
) -> tuple[StoredKind, ...]:
    """Sort a LoRA's pairs into kinds; raises as `read_adapter`."""
    matrices: dict[str, tuple[Tensor, Tensor, float]] = {}
    for key, (a, b) in _factors(tensors, where).items():
        scale = scale_of(config, key)
        for name, a_RI, b_OR in _as_sites(key, a, b, config):
            fit = a_RI.ndim == b_OR.ndim == 2 and a_RI.shape[0] == b_OR.shape[1]
            if not fit:
                raise AdapterFileError(
                    f"{where}: A {tuple(a.shape)} and B {tuple(b.shape)} of {key!r} have no "
                    f"product B A. The file is damaged, or no LoRA's."
                )
            matrices[name] = a_RI, b_OR, scale(a_RI.shape[0])
    if base is not None:
        _check_fit(matrices, base, where)
    sites = []
    for key, (a_RI, b_OR, _) in matrices.items():
        stack, block, kind = place_of(key, config, base)
        shape = Shape("linear", b_OR.shape[0], a_RI.shape[1])
        sites.append(Site(key, stack, kind, block, shape))
    # The level is only there to have the kinds named and ordered as a plan's are.
    kinds = arrange(sites, [Level("lora", rank=1, groups=0, alpha=1)]).kinds
    return tuple(
        StoredKind(
            kind.name,
            tuple(
                StoredPair("lora", depth, scale, a_RI, b_OR)
                for depth, site in enumerate(kind.sites)
                for a_RI, b_OR, scale in [matrices[site.key]]
            ),
            tuple(
                StoredSite(site.key, site.block, (depth,)) for depth, site in enumerate(kind.sites)
            ),
        )
        for kind in kinds
    )


def _factors(tensors: Mapping[str, Tensor], where: str) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = LORA_TENSOR.fullmatch(name)
        if match:
            found.setdefault(match.group(1), {})[match.group(2)] = tensor
        elif ".lora_" in name and not name.endswith(".bias"):
            raise UnsupportedError(
                f"{where} holds {name!r}, which is no factor of a plain LoRA: its update is not "
                f"s B A alone. Adapters of LoRA and MSPLoRA, without DoRA, are analysed."
            )
    alone = [f"{key}: only {next(iter(its))}" for key, its in found.items() if len(its) < 2]
    if alone or not found:
        raise AdapterFileError(
            f"{where} holds {'half of a pair, ' + alone[0] if alone else 'no pair of a LoRA'}. The "
            f"file is not whole; save or copy the adapter again."
        )
    return {key: (its["A"], its["B"]) for key, its in found.items()}


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


def _check_fit(
    matrices: Mapping[str, tuple[Tensor, Tensor, float]], base: Base, where: str
) -> None:
    for key, (a_RI, b_OR, _) in matrices.items():
        path = key.partition("[")[0].replace(".base_layer", "")
        module = base.module(path)
        found = module is not None
        # Of convolutions and experts it is enough that they are there.
        if isinstance(module, nn.Linear):
            found = tuple(module.weight.shape) == (b_OR.shape[0], a_RI.shape[1])
        if not found:
            shape = "" if module is None else f" of shape {tuple(module.weight.shape)}"
            raise BaseModelError(
                f"the base {base.source!r} does not match {where}: that adapts {path!r} of shape "
                f"{(b_OR.shape[0], a_RI.shape[1])}, and the base has "
                f"{'no such weight' if module is None else 'it' + shape}. Pass the model that the "
                f"adapter was made for."
            )
