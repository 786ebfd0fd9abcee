"""The updates in the file of a pyramid: pairs by their addresses, and who borrows them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from msplora.config import MSPLoraConfig
from msplora.errors import AdapterFileError, BaseModelError, TargetError
from msplora.matching import STORE_NAME, pattern_matches
from msplora.planning import plan
from msplora.pyramid import PER_LAYER, Level, Plan
from msplora.spectrum import as_matrices
from msplora.store import A, B, name_in_file

from .base import Base
from .on_disk import TensorsOnDisk
from .stored import StoredKind, StoredPair, StoredSite

_TENSOR = re.compile(
    rf"(?:.*\.)?{STORE_NAME}\.(?P<level>[a-z0-9_]+)/(?P<group>\d+)/(?P<kind>.+)/pair"
    rf"\.(?P<factor>{A}|{B})\.factor"
)
_SHOWN = 3


def planned_kinds(
    tensors: TensorsOnDisk, config: MSPLoraConfig, base: Base
) -> tuple[StoredKind, ...]:
    """The kinds of the plan that the config makes of its base; raises as `read_adapter`."""
    made_for = config.model_type, config.fingerprint
    wrong = f"the base {base.source!r} does not match {tensors.path}: "
    if made_for[0] not in (None, base.model_type):
        raise BaseModelError(
            f"{wrong}that was made for a {made_for[0]}, and this is a {base.model_type}. Pass the "
            f"model that the adapter was made for."
        )
    base.take_tokens_of(tensors.shapes)
    try:
        found = plan(base.model, config)
    except TargetError as error:
        raise BaseModelError(f"{wrong}{error}") from None
    if made_for[1] not in (None, found.fingerprint):
        raise BaseModelError(
            f"{wrong}names and shapes of the adapted weights have the hash {found.fingerprint}, "
            f"and the adapter's had {made_for[1]}. Pass the model that it was made for."
        )
    return _kinds_of_plan(tensors, found)


def _kinds_of_plan(tensors: TensorsOnDisk, found: Plan) -> tuple[StoredKind, ...]:
    stored = _addresses(tensors)
    _refuse_missing([pair.address for pair in found.pairs], stored, tensors.path)
    kinds = []
    for kind in found.kinds:
        pairs = [pair for pair in found.pairs if pair.kind == kind.name]
        experts = kind.shape.blocks if kind.shape.layout == "experts" else 1
        for expert in range(experts):
            matrices = []
            for pair in pairs:
                names = stored[pair.address]
                a, b = (tensors.shapes[name] for name in names)
                wanted = kind.shape.a(pair.rank), kind.shape.b(pair.rank)
                if (tuple(a.shape), tuple(b.shape)) != wanted:
                    raise _misshapen(tensors.path, pair.address, a, b, wanted)
                level = pair.level, pair.group, pair.scale
                matrices.append(_pair(*level, tensors, names, experts, expert))
            name = kind.name if experts == 1 else f"{kind.name}[expert {expert}]"
            sites = tuple(
                StoredSite(
                    site.key,
                    site.block,
                    tuple(place for place, pair in enumerate(pairs) if site.key in pair.sites),
                )
                for site in kind.sites
            )
            kinds.append(StoredKind(name, tuple(matrices), sites))
    return tuple(kinds)


def counted_kinds(tensors: TensorsOnDisk, config: MSPLoraConfig) -> tuple[StoredKind, ...]:
    """The kinds as the file alone tells them; raises as `read_adapter`."""
    where = tensors.path
    stored = _addresses(tensors)
    groups: dict[str, dict[str, set[int]]] = {}  # kind -> level -> groups
    for address in stored:
        level, group, kind = address.split("/", 2)
        groups.setdefault(kind, {}).setdefault(level, set()).add(int(group))
    if not groups:
        raise AdapterFileError(
            f"{where} holds no pair of a pyramid. The file is not whole, or not this adapter's; "
            f"save or copy it again."
        )
    levels = levels_of(config, list(groups))
    kinds = []
    for kind, found in groups.items():
        layers = _layers(kind, found, levels[kind], where)
        wanted = [
            f"{level.name}/{group}/{kind}"
            for level in levels[kind]
            for group in range(level.groups_among(layers))
        ]
        _refuse_missing(wanted, stored, where)
        kinds += _counted(kind, layers, levels[kind], stored, config, tensors)
    return tuple(sorted(kinds, key=lambda kind: kind.name))


def _counted(
    kind: str,
    layers: int,
    levels: tuple[Level, ...],
    stored: Mapping[str, tuple[str, str]],
    config: MSPLoraConfig,
    tensors: TensorsOnDisk,
) -> list[StoredKind]:
    first_a, first_b = (tensors.shapes[name] for name in stored[f"{levels[0].name}/0/{kind}"])
    experts = experts_of(config, kind, (*first_a.shape, 1)[0], levels[0].rank)
    borrowed: list[list[int]] = [[] for _ in range(layers)]
    matrices: list[list[StoredPair]] = [[] for _ in range(experts)]
    place = 0
    for level in levels:
        for group in range(level.groups_among(layers)):
            address = f"{level.name}/{group}/{kind}"
            names = stored[address]
            a, b = (tensors.shapes[name] for name in names)
            wanted = _beside(first_a, first_b, level.rank * experts)
            if (tuple(a.shape), tuple(b.shape)) != wanted or not a.ndim == b.ndim >= 2:
                raise _misshapen(tensors.path, address, a, b, wanted)
            for expert in range(experts):
                its = level.name, group, level.scale
                matrices[expert].append(_pair(*its, tensors, names, experts, expert))
            for layer in range(layers):
                if level.group_of(layer, layers) == group:
                    borrowed[layer].append(place)
            place += 1
    numbers, counted = block_numbers(config, layers)
    sites = tuple(
        StoredSite(f"{number}.{kind}", number, tuple(its))
        for number, its in zip(numbers, borrowed, strict=True)
    )
    names = [kind] if experts == 1 else [f"{kind}[expert {expert}]" for expert in range(experts)]
    everywhere = counted and _means_all_blocks(config)
    return [
        StoredKind(name, tuple(pairs), sites, counted, everywhere)
        for name, pairs in zip(names, matrices, strict=True)
    ]


def experts_of(config: MSPLoraConfig, kind: str, rows: int, rank: int) -> int:
    """How many experts share a pair: of a parameter as many as its rows are for, else one.

    Args:
        config: the adapter's.
        kind: the pair's, as the file names it.
        rows: of its A.
        rank: that the config asks for.
    """
    path, wanted = f".{path_of(kind)}", getattr(config, "target_parameters", None) or ()
    is_parameter = any(path.endswith(f".{its}") or f".{its}".endswith(path) for its in wanted)
    return max(1, rows // rank) if is_parameter else 1


def _beside(a: Tensor, b: Tensor, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a pair for the same weights as A and B, with so many rows in its A."""
    groups = max(1, len(a) // max(1, b.shape[1])) if a.ndim == b.ndim > 2 else 1
    return (rows, *a.shape[1:]), (*b.shape[:1], rows // groups, *b.shape[2:])


def _pair(
    level: str,
    group: int,
    scale: float,
    tensors: TensorsOnDisk,
    names: tuple[str, str],
    experts: int,
    expert: int,
) -> StoredPair:
    """A pair of the file; of experts, that of one."""

    def read() -> tuple[Tensor, Tensor]:
        a, b = (tensors[name] for name in names)
        return matrices_of(a, b, experts, expert)

    a, b = (tensors.shapes[name] for name in names)
    a_RI, b_OR = matrices_of(a, b, experts, expert)
    rank, in_features = a_RI.shape
    parameters = (a.numel() + b.numel()) // experts
    return StoredPair(level, group, scale, rank, in_features, b_OR.shape[0], parameters, read)


def _addresses(tensors: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Address of a pair → the names of its A and B; of a pair that is not whole, nothing."""
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        place = address_of(name)
        if place:
            found.setdefault(place[0], {})[place[1]] = name
    return {address: (its[A], its[B]) for address, its in found.items() if len(its) == 2}


def address_of(name: str) -> tuple[str, str] | None:
    """The pair that a tensor of the file belongs to, and which of its factors it is."""
    match = _TENSOR.fullmatch(name)
    if match is None:
        return None
    kind = match["kind"].replace("/", ".")
    return f"{match['level']}/{match['group']}/{kind}", match["factor"]


def block_numbers(config: MSPLoraConfig, layers: int) -> tuple[list[int], bool]:
    """The numbers of a kind's blocks, and whether they are only counted from 0.

    They are known where the config lists as many as there are.
    """
    asked: Any = config.layers_to_transform
    numbers = sorted({asked} if isinstance(asked, int) else set(asked or ()))
    counted = len(numbers) != layers
    return list(range(layers)) if counted else numbers, counted


def _means_all_blocks(config: MSPLoraConfig) -> bool:
    """Whether a config names what it adapts by ends of paths, which all blocks have."""
    asked = config.target_modules or ()
    if isinstance(asked, str) or config.exclude_modules or config.layers_to_transform is not None:
        return False
    names = [*asked, *(config.target_parameters or ())]
    return not any(part.isdigit() for name in names for part in name.split("."))


def _refuse_missing(wanted: list[str], stored: Mapping[str, tuple[str, str]], where: Path) -> None:
    missing = [address for address in wanted if address not in stored]
    left_over = [address for address in stored if address not in wanted]
    # Another kind's are not left over: whoever asks for one kind knows only of that.
    kinds = {address.split("/", 2)[2] for address in wanted}
    left_over = [address for address in left_over if address.split("/", 2)[2] in kinds]
    if not missing and not left_over:
        return
    what = "lacks" if missing else "holds, beyond the pyramid of its config,"
    which = missing or left_over
    levels = sorted({address.partition("/")[0] for address in which})
    more = f" and {len(which) - _SHOWN} more" if len(which) > _SHOWN else ""
    raise AdapterFileError(
        f"{where} {what} {len(which)} pair(s) of the level(s) {', '.join(levels)}: "
        f"{', '.join(which[:_SHOWN])}{more} (as {name_in_file(which[0], A)}). The file is not "
        f"whole, or not this config's; save or copy the adapter again."
    )


def _layers(
    kind: str, found: Mapping[str, set[int]], levels: tuple[Level, ...], where: Path
) -> int:
    """How many layers share the pairs of a kind: as many as a level of one pair each has."""
    missing = [level.name for level in levels if level.name not in found]
    if missing:
        raise AdapterFileError(
            f"{where} lacks the level(s) {', '.join(missing)} of {kind!r}: the config's pyramid "
            f"has {', '.join(level.name for level in levels)}. The file is not whole; save or copy "
            f"the adapter again."
        )
    own = [max(found[level.name]) + 1 for level in levels if level.groups == PER_LAYER]
    if not own:
        raise BaseModelError(
            f"{where}: no level has a pair for each layer, so the file alone does not say how many "
            f"layers share. Pass --base."
        )
    return max(own)


def levels_of(config: MSPLoraConfig, kinds: list[str]) -> dict[str, tuple[Level, ...]]:
    """Kind → its levels; with patterns, those of the first that matches the kind's name."""
    found = dict.fromkeys(kinds, config.pyramid)
    values: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    for what in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (getattr(config, what) or {}).items():
            of = [kind for kind in kinds if pattern_matches(pattern, path_of(kind))]
            if not of:
                raise BaseModelError(
                    f"{what} names {pattern!r}, which the file alone does not tell apart. Pass "
                    f"--base."
                )
            for kind in of:
                values[kind].setdefault(what, value)
    for kind, its in values.items():
        if its:
            found[kind] = config.pyramid_with(its.get("rank_pattern"), its.get("alpha_pattern"))
    return found


def path_of(kind: str) -> str:
    """The path inside the block: a kind's name may hold its list of blocks and its shape too."""
    return kind.rpartition(":")[2].partition("[")[0]


def matrices_of(a: Tensor, b: Tensor, experts: int, expert: int) -> tuple[Tensor, Tensor]:
    """A pair as matrices (R, I), (O, R); of experts, those of one."""
    if experts > 1:
        a_ERI, b_EOR = as_matrices(a, b, experts=experts)
        return a_ERI[expert], b_EOR[expert]
    groups = len(a) // b.shape[1] if a.ndim > 2 else 1
    return as_matrices(a, b, groups=groups)


def _misshapen(where: Path, address: str, a: Tensor, b: Tensor, wanted: Any) -> AdapterFileError:
    return AdapterFileError(
        f"{where}: pair {address} has A {tuple(a.shape)} and B {tuple(b.shape)}; the config asks "
        f"for {wanted[0]} and {wanted[1]}. The file is not this config's; save or copy the adapter "
        f"again."
    )
