"""The pairs that an adapter's file should hold and those that it holds, from names and shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from msplora.analysis.asked_of_lora import asked_of
from msplora.analysis.reading_lora import LORA_TENSOR, place_of, without_adapter_name, wrapped
from msplora.analysis.reading_pyramid import address_of, block_numbers, experts_of, levels_of
from msplora.config import MSPLoraConfig
from msplora.errors import BaseModelError
from msplora.pyramid import PER_LAYER, Level, Shape, Site, arrange
from msplora.store import A

from .results import Finding
from .suspicions import left_over, missing, note, unknown_scales
from .tensor_file import TensorFiles


@dataclass(frozen=True)
class Entry:
    """A pair of the file that some layer borrows."""

    address: str
    kind: str
    level: Level
    """Its rank and scale."""
    layers: tuple[int, ...]
    """The numbers of the blocks that borrow it, as far as the file tells."""
    weights: int
    """How many weights borrow it, at least."""
    a: str
    """The name of the tensor A …"""
    b: str
    """… and of B."""
    experts: int = 1


@dataclass(frozen=True)
class Entries:
    """All pairs, and what is wrong with the file by its names alone."""

    pairs: tuple[Entry, ...]
    levels: tuple[Level, ...]
    """As the config asks for them."""
    findings: tuple[Finding, ...]
    used: frozenset[str]
    """The names of all tensors that are a factor, borrowed or not."""


def entries_of(files: TensorFiles, config: Any) -> Entries:
    """The pairs of an adapter."""
    if isinstance(config, MSPLoraConfig):
        return _of_pyramid(files, config)
    return _of_lora(files, config)


def _of_pyramid(files: TensorFiles, config: MSPLoraConfig) -> Entries:
    stored: dict[str, dict[str, str]] = {}
    for name in files.headers:
        place = address_of(name)
        if place:
            stored.setdefault(place[0], {})[place[1]] = name
    used = frozenset(name for its in stored.values() for name in its.values())
    # (level, kind) -> the numbers of the groups that the file has, whole or not.
    groups: dict[tuple[str, str], list[int]] = {}
    for address in stored:
        level, group, kind = address.split("/", 2)
        groups.setdefault((level, kind), []).append(int(group))
    kinds = sorted({kind for _, kind in groups})
    findings: list[Finding] = []
    try:
        levels = levels_of(config, kinds)
    except BaseModelError:  # patterns that only the base's paths tell apart
        levels = dict.fromkeys(kinds, config.pyramid)
        findings.append(unknown_scales(config))
    pairs: list[Entry] = []
    lacking: list[str] = []
    for kind in kinds:
        found, its_lacking = _of_kind(kind, levels[kind], stored, groups, config, files)
        pairs += found
        lacking += its_lacking
    borrowed = {entry.address for entry in pairs} | set(lacking)
    findings += missing(lacking, whole=bool(stored))
    findings += left_over([address for address in stored if address not in borrowed])
    order = [level.name for level in config.pyramid]
    pairs.sort(key=lambda entry: order.index(entry.level.name))
    return Entries(tuple(pairs), config.pyramid, tuple(findings), used)


def _of_kind(
    kind: str,
    levels: tuple[Level, ...],
    stored: dict[str, dict[str, str]],
    all_groups: dict[tuple[str, str], list[int]],
    config: MSPLoraConfig,
    files: TensorFiles,
) -> tuple[list[Entry], list[str]]:
    """The pairs of a kind, and the addresses of those that are missing or halved."""
    # A file of T tensors has fewer than T groups: a greater number is left over, not counted to.
    groups = {
        level.name: [
            its for its in all_groups.get((level.name, kind), ()) if its < len(files.headers)
        ]
        for level in levels
    }
    # As many layers as a level of one pair each has; any such level will do if one is lost.
    own = [
        max(groups[its.name]) + 1 for its in levels if its.groups == PER_LAYER if groups[its.name]
    ]
    layers = max(own, default=None)
    numbers = block_numbers(config, layers)[0] if layers else []
    found, lacking = [], []
    for level in levels:
        # Without a level that counts the layers, what there is may be whole; one pair has to be.
        most = max(groups[level.name], default=0) + 1
        wanted = level.groups_among(layers) if layers else most
        for group in range(wanted):
            address = f"{level.name}/{group}/{kind}"
            names = stored.get(address, {})
            if len(names) < 2:
                lacking.append(address)
                continue
            b = next(name for factor, name in names.items() if factor != A)
            borrowers = tuple(
                number
                for depth, number in enumerate(numbers)
                if layers and level.group_of(depth, layers) == group
            )
            found.append(
                Entry(
                    address,
                    kind,
                    level,
                    borrowers,
                    max(len(borrowers), 1),
                    names[A],
                    b,
                    experts_of(config, kind, files.headers[names[A]].rows, level.rank),
                )
            )
    return found, lacking


def _of_lora(files: TensorFiles, config: Any) -> Entries:
    stored: dict[str, dict[str, str]] = {}
    for name in files.headers:
        match = LORA_TENSOR.fullmatch(without_adapter_name(name))
        if match:
            stored.setdefault(match.group(1), {})[match.group(2)] = name
    used = frozenset(name for its in stored.values() for name in its.values())
    lacking = [key for key, its in stored.items() if len(its) < 2]
    sites, is_wrapped = list[Site](), wrapped(stored)
    for key, names in stored.items():
        if key not in lacking:
            stack, block, kind = place_of(key, config, None, is_wrapped)
            columns = (files.headers[names["A"]].shape or (1,))[-1]
            shape = Shape("linear", files.headers[names["B"]].rows, columns)
            sites.append(Site(key, stack, kind, block, shape))
    # The level is only there to have the kinds named and ordered as a plan's are.
    kinds = arrange(sites, [Level("lora", rank=1, groups=PER_LAYER, alpha=1)]).kinds
    rows = {site.key: files.headers[stored[site.key]["A"]].rows for site in sites}
    asked = asked_of(rows, config, None)
    pairs = []
    for kind in kinds:
        for site in kind.sites:
            names, its = stored[site.key], asked[site.key][0]
            if len(asked[site.key]) > 1:  # which is said below
                its = replace(its, alpha=config.lora_alpha)
            several = its.is_parameter and rows[site.key] % its.rank == 0
            level = Level("lora", its.rank, PER_LAYER, its.scale(its.rank) * its.rank)
            pairs.append(
                Entry(
                    site.key,
                    kind.name,
                    level,
                    () if site.block is None else (site.block,),
                    1,
                    names["A"],
                    names["B"],
                    rows[site.key] // its.rank if several else 1,
                )
            )
    level = Level("lora", config.r, PER_LAYER, config.lora_alpha, config.use_rslora)
    findings = missing(lacking, whole=bool(stored))
    if any(len(its) > 1 for its in asked.values()):
        findings.append(unknown_scales(config))
    named = next((name for name in used if without_adapter_name(name) != name), None)
    if named:
        findings.append(
            note(
                f"Its tensors are named as in a model's state dict, such as {named}: not every "
                f"PEFT reads that, and few servers. Save it with save_pretrained."
            )
        )
    return Entries(tuple(pairs), (level,), tuple(findings), used)
