"""The updates in the file of a plain LoRA: every site has a pair of its own."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from math import lcm
from pathlib import Path
from typing import Any

from torch import Tensor

from msplora.blocks import place
from msplora.errors import AdapterFileError, BaseModelError, UnsupportedError
from msplora.pyramid import Level, Shape, Site, arrange
from msplora.spectrum import as_matrices

from .asked_of_lora import Asked, asked_of
from .base import Base
from .names_of_now import by_names_of_now
from .on_disk import TensorsOnDisk
from .other_products import is_beside_the_product
from .stored import StoredKind, StoredPair, StoredSite

LORA_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
"""The name of a factor: its site, and which of the two it is."""
_OF_A_STATE_DICT = re.compile(r"(\.lora_(?:embedding_[AB]|[AB]|magnitude_vector))\.default(?=\.|$)")


def without_adapter_name(name: str) -> str:
    """A tensor's name as `save_pretrained` writes it, where a state dict's has the adapter's too.

    PEFT loads both.
    """
    return _OF_A_STATE_DICT.sub(r"\1", name)


def lora_kinds(
    tensors: TensorsOnDisk, config: Any, base: Base | None
) -> tuple[tuple[StoredKind, ...], str]:
    """Sort a LoRA's pairs into kinds, and say the fingerprint of a pyramid on the same weights.

    Raises as `read_adapter`.
    """
    if base is not None:
        base.take_tokens_of(tensors.shapes)
        tensors = by_names_of_now(tensors, config, base)
    pairs: dict[str, StoredPair] = {}
    shapes: dict[str, Shape] = {}
    unnamed: set[str] = set()
    factors = _factors(tensors)
    for key, asked in _asked(factors, tensors, config, base).items():
        names = factors[key]
        a, b = (tensors.shapes[name] for name in names)
        matrices = _as_sites(asked, a, b)
        for number, (site, a_RI, b_OR) in enumerate(matrices):
            fit = a_RI.ndim == b_OR.ndim == 2 and a_RI.shape[0] == b_OR.shape[1]
            if not fit:
                raise AdapterFileError(
                    f"{tensors.path}: A {tuple(a.shape)} and B {tuple(b.shape)} of {key!r} have no "
                    f"product B A. The file is damaged, or no LoRA's."
                )
            read = partial(_read_site, tensors, asked, names, number)
            rank, in_features = a_RI.shape
            _check_rank(rank, asked, key, tensors.path)
            its = "lora", 0, asked.scale(rank)
            parameters = (a.numel() + b.numel()) // len(matrices)
            pairs[site] = StoredPair(*its, rank, in_features, b_OR.shape[0], parameters, read)
            if asked.is_parameter and asked.name == key:
                unnamed.add(site)
            shapes[site] = _shape(names[0], a, b, (b_OR.shape[0], in_features))
        if asked.is_parameter and len(a) % asked.rank:
            raise AdapterFileError(
                f"{tensors.path}: A {tuple(a.shape)} of {key!r} is of no whole number of experts "
                f"of rank {asked.rank}, which the config asks for. The file is not this config's; "
                f"save or copy the adapter again."
            )
        if base is not None:
            _check_fit(asked, a, b, base, tensors.path)
    sites, wrapping = [], wrapped(pairs)
    for key in pairs:
        stack, block, kind = place_of(key, config, base, wrapping)
        sites.append(Site(key, stack, kind, block, shapes[key]))
    # The level is only there to have the kinds named and ordered as a plan's are; its rank is one
    # that all groups of convolutions divide.
    rank = lcm(*(its.blocks for its in shapes.values()))
    plan = arrange(sites, [Level("lora", rank, groups=0, alpha=1)])
    kinds = tuple(
        StoredKind(
            kind.name,
            tuple(replace(pairs[site.key], group=depth) for depth, site in enumerate(kind.sites)),
            tuple(
                StoredSite(site.key, site.block, (depth,)) for depth, site in enumerate(kind.sites)
            ),
            unnamed=kind.sites[0].key in unnamed,
        )
        for kind in plan.kinds
    )
    return kinds, plan.fingerprint


def _factors(tensors: TensorsOnDisk) -> dict[str, tuple[str, str]]:
    """Site → the names of its A and its B."""
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = LORA_TENSOR.fullmatch(without_adapter_name(name))
        if match:
            found.setdefault(match.group(1), {})[match.group(2)] = name
        elif ".lora_" in name and not is_beside_the_product(name):
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


def _asked(
    factors: Mapping[str, tuple[str, str]], tensors: TensorsOnDisk, config: Any, base: Base | None
) -> dict[str, Asked]:
    """What the config asks of each site."""
    rows = {key: (*tensors.shapes[a].shape, 1)[0] for key, (a, _) in factors.items()}
    found = asked_of(rows, config, base)
    for its in found.values():
        if len(its) > 1:
            names = ", ".join(one.name for one in its)
            raise BaseModelError(
                f"{tensors.path}: rank_pattern or alpha_pattern asks for different things of "
                f"{names}, and the file alone does not tell their pairs apart. Pass --base."
            )
    return {key: its[0] for key, its in found.items()}


def _check_rank(rank: int, asked: Asked, key: str, where: Path) -> None:
    """Refuse a rank that the config does not ask for: it would be scaled by the wrong number.

    Of a parameter A has a rank for each expert, which is looked at where these are told apart.
    """
    if rank and (asked.is_parameter or rank == asked.rank):
        return
    raise AdapterFileError(
        f"{where}: A and B of {key!r} have rank {rank}, and the config asks for {asked.rank} (r or "
        f"rank_pattern). The file is not this config's; save or copy the adapter again."
    )


def _read_site(
    tensors: TensorsOnDisk, asked: Asked, names: tuple[str, str], number: int
) -> tuple[Tensor, Tensor]:
    """One of the matrices that a pair of tensors holds."""
    a, b = (tensors[name] for name in names)
    return _as_sites(asked, a, b)[number][1:]


def _as_sites(asked: Asked, a: Tensor, b: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """A site's factors as matrices; experts, whose weights are one parameter, each as a site."""
    experts = len(a) // asked.rank if asked.is_parameter and a.ndim == 2 else 1
    if experts > 1 and len(a) == experts * asked.rank and b.shape[-1] == len(a):
        stacked = as_matrices(a, b, experts=experts)
        return [
            (f"{asked.name}[expert {number}]", a_RI, b_OR)
            for number, (a_RI, b_OR) in enumerate(zip(*stacked, strict=True))
        ]
    groups = len(a) // b.shape[1] if a.ndim > 2 and b.ndim == a.ndim and b.shape[1] else 1
    return [(asked.name, *as_matrices(a, b, groups=groups))]


def _shape(name: str, a: Tensor, b: Tensor, matrix: tuple[int, int]) -> Shape:
    """The shape of a site's weight as a plan has it; its kind may have it in its name."""
    if a.ndim > 2 and b.shape[1]:
        return Shape("conv", b.shape[0], a.shape[1], tuple(a.shape[2:]), len(a) // b.shape[1])
    return Shape("embedding" if ".lora_embedding_" in name else "linear", *matrix)


def wrapped(keys: Iterable[str]) -> frozenset[str]:
    """The lists that hold a model and not its blocks, as sentence-transformers' `nn.Sequential`.

    Paths that begin with a number lie in one. The list of the blocks is the outermost of which two
    have the same place inside; where there is none, as of one block, the second.
    """
    paths = [key.split(".") for key in keys]
    numbers: dict[tuple[str, str], set[str]] = {}
    for names in paths:
        for at in _numbers(names):
            where = ".".join(names[:at]), ".".join(names[at + 1 :])
            numbers.setdefault(where, set()).add(names[at])
    lists = {stack for (stack, _), its in numbers.items() if len(its) > 1}
    found: set[str] = set()
    for names in paths:
        stacks = [".".join(names[:at]) for at in _numbers(names)]
        if names[0].isdigit() and lists.intersection(stacks):
            found.update(takewhile(lambda its: its not in lists, stacks))
    in_one = len({names[0] for names in paths}) == 1 and paths[0][0].isdigit()
    if in_one and not lists and any(len(_numbers(names)) > 1 for names in paths):
        found.add("")
    return frozenset(found)


def _numbers(names: Sequence[str]) -> list[int]:
    """Where a path has numbers."""
    return [at for at, name in enumerate(names) if name.isdigit()]


def place_of(
    key: str, config: Any, base: Base | None, wrapping: Collection[str] = ()
) -> tuple[str, int | None, str]:
    """The stack, the block's number and the kind; without the base, by the outermost number.

    Args:
        key: the path.
        config: PEFT's.
        base: the base, where it is known.
        wrapping: the lists that are none of blocks.
    """
    if base is not None:
        path = key.partition("[")[0]
        stack, block, kind = place(base.model, path, config.layers_pattern)
        return stack, block, kind + key[len(path) :]
    names = key.split(".")
    numbers = [at for at in _numbers(names) if ".".join(names[:at]) not in wrapping]
    if not numbers:
        return key, None, key
    at = numbers[0]
    return ".".join(names[:at]), int(names[at]), ".".join(names[at + 1 :]) or "self"


def _check_fit(asked: Asked, a: Tensor, b: Tensor, base: Base, where: Path) -> None:
    """Refuse a base that lacks the weight, or has it in another shape."""
    shape = base.shape(asked.name)
    rank = asked.rank if asked.is_parameter else len(a)
    its = tuple(a.shape), tuple(b.shape)
    if base.module(asked.name) is None:
        found = "no such weight"
    elif shape is not None and its != (shape.a(rank), shape.b(rank)):
        found = f"it of shape {shape}"
    else:
        return
    raise BaseModelError(
        f"the base {base.source!r} does not match {where}: A {its[0]} and B {its[1]} are for "
        f"{asked.name!r}, and the base has {found}. Pass the model that the adapter was made for."
    )
