"""Who shares with whom: sites, levels, pairs and the plan. Pure Python, imports no torch.

    h = W0 x + sum over levels t of  s_t B_t A_t x            (arXiv 2503.21838)

A *site* is one adapted weight. Sites of one *kind* (the path inside the block, and the shape) in
one *stack* (a list of blocks) share: on a level of G groups, the L blocks that hold the kind are
cut into G' = min(G, L) contiguous groups, block number l (counted among those L) being in group
floor(l G' / L). Every group owns one *pair* (A, B), addressed ``level/group/kind``.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from .errors import TargetError

Layout = Literal["linear", "conv", "embedding", "experts"]

PER_LAYER = 0
"""The number of groups that means "one pair per layer"."""


@dataclass(frozen=True)
class Level:
    """One storey of the pyramid."""

    name: str
    rank: int
    groups: int
    """Groups the layers of a kind are cut into; `PER_LAYER` (0) gives every layer its own pair."""
    alpha: float
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """The factor s_t on B_t A_t: alpha / rank; rank-stabilised, alpha / sqrt(rank)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def groups_among(self, layers: int) -> int:
        """How many groups `layers` layers are really cut into: G' = min(G, L)."""
        return layers if self.groups == PER_LAYER else min(self.groups, layers)

    def group_of(self, depth: int, layers: int) -> int:
        """The group of the layer at `depth` of `layers`: floor(l G' / L)."""
        return depth * self.groups_among(layers) // layers


@dataclass(frozen=True)
class Shape:
    """The shape of an adapted weight, as a low-rank pair sees it."""

    layout: Layout
    out_features: int
    in_features: int
    kernel: tuple[int, ...] = ()
    """A convolution's kernel."""
    blocks: int = 1
    """The number of experts, or of a convolution's groups."""

    def a(self, rank: int) -> tuple[int, ...]:
        """The shape of A, as PEFT's LoRA has it for this layout."""
        rows = rank * self.blocks if self.layout == "experts" else rank
        return (rows, self.in_features, *self.kernel)

    def b(self, rank: int) -> tuple[int, ...]:
        """The shape of B, as PEFT's LoRA has it for this layout."""
        if self.layout == "experts":
            return (self.out_features, rank * self.blocks)
        if self.layout == "conv":
            return (self.out_features, rank // self.blocks, *(1 for _ in self.kernel))
        return (self.out_features, rank)

    def parameters(self, rank: int) -> int:
        """The numbers in one pair of this rank."""
        return math.prod(self.a(rank)) + math.prod(self.b(rank))

    def __str__(self) -> str:
        text = f"{self.out_features}x{self.in_features}"
        if self.kernel:
            text += "x" + "x".join(map(str, self.kernel))
        return text if self.blocks == 1 else f"{self.blocks}*{text}"


@dataclass(frozen=True)
class Site:
    """One adapted weight of the model."""

    key: str
    """The module's path, or the parameter's."""
    stack: str
    """The path of the list of blocks it lies in; its own path where it lies in none."""
    kind: str
    """The path inside the block."""
    block: int | None
    """The block's number in its list, `None` outside every list."""
    shape: Shape


@dataclass(frozen=True)
class Pair:
    """One shared (A, B)."""

    address: str
    """``<level>/<group>/<kind>``."""
    level: str
    group: int
    kind: str
    """The kind as addresses name it."""
    rank: int
    scale: float
    shape: Shape
    sites: tuple[str, ...]
    """The keys of the sites that borrow it, in depth order."""
    blocks: tuple[int | None, ...]
    """The numbers of those sites' blocks."""

    @property
    def parameters(self) -> int:
        return self.shape.parameters(self.rank)


@dataclass(frozen=True)
class Kind:
    """The sites that share with each other."""

    name: str
    stack: str
    path: str
    shape: Shape
    levels: tuple[Level, ...]
    sites: tuple[Site, ...]
    """In depth order."""
    own_rank: bool = field(default=False, compare=False)
    """Whether a rank pattern says its first rank, be it that of all."""

    @property
    def layers(self) -> int:
        return len(self.sites)

    @property
    def rank(self) -> int:
        """R, the rank of the one LoRA that every site of this kind is."""
        return sum(level.rank for level in self.levels)

    @property
    def parameters(self) -> int:
        return sum(
            level.groups_among(self.layers) * self.shape.parameters(level.rank)
            for level in self.levels
        )


@dataclass(frozen=True)
class Plan:
    """The frozen map from sites to pairs. Print it: `str(plan)`."""

    levels: tuple[Level, ...]
    kinds: tuple[Kind, ...]
    pairs: tuple[Pair, ...]
    use_dora: bool = False
    tied: tuple[tuple[str, str], ...] = ()
    """(tied head, embedding whose pairs it borrows), where `ensure_weight_tying` asks for it."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What the user should know, in sentences."""

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for kind in self.kinds for site in kind.sites)

    @cached_property
    def pairs_of(self) -> Mapping[str, tuple[Pair, ...]]:
        """Site key -> its pairs, one per level, in the order of the levels."""
        found: dict[str, list[Pair]] = {site.key: [] for site in self.sites}
        for pair in self.pairs:
            for key in pair.sites:
                found[key].append(pair)
        return {key: tuple(pairs) for key, pairs in found.items()}

    @cached_property
    def site_of(self) -> Mapping[str, Site]:
        return {site.key: site for site in self.sites}

    @property
    def parameters_per_level(self) -> dict[str, int]:
        counts = {level.name: 0 for level in self.levels}
        for pair in self.pairs:
            counts[pair.level] += pair.parameters
        return counts

    @property
    def magnitude_parameters(self) -> int:
        """DoRA's magnitudes, one per output feature of every site."""
        if not self.use_dora:
            return 0
        return sum(kind.shape.out_features * kind.layers for kind in self.kinds)

    @property
    def parameters(self) -> int:
        """The numbers this adapter trains (besides `bias` and `modules_to_save`)."""
        return sum(self.parameters_per_level.values()) + self.magnitude_parameters

    @property
    def lora_parameters(self) -> int:
        """What plain LoRA of the first level's rank trains on the same sites."""
        per_site = sum(
            kind.layers * kind.shape.parameters(kind.levels[0].rank) for kind in self.kinds
        )
        return per_site + self.magnitude_parameters

    @property
    def fingerprint(self) -> str:
        """A hash of the sites' keys and shapes: it tells one base from another."""
        lines = sorted(f"{site.key} {site.shape.layout} {site.shape}" for site in self.sites)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Everything the plan holds, as JSON can write it."""
        from .plan_text import plan_dict

        return plan_dict(self)

    def to_html(self, model: str | None = None) -> str:
        """One page that draws it, with sliders; `model` is a name for its title."""
        from .plan_page.page import render

        return render(self, model)

    def __str__(self) -> str:
        from .plan_text import plan_text

        return plan_text(self)


def arrange(
    sites: Iterable[Site],
    levels: Sequence[Level],
    *,
    levels_of: Mapping[str, tuple[Level, ...]] | None = None,
    own_rank: Collection[str] = (),
    use_dora: bool = False,
    tied: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """Work out the plan of `sites` under `levels`; the order of the sites does not matter.

    Args:
        sites: the adapted weights.
        levels: the storeys, first to last.
        levels_of: site key -> its own levels, where a rank or alpha pattern asks for others.
        own_rank: keys of sites for which a rank pattern says the rank.
        use_dora: count one magnitude per output feature of every site.
        tied: key of a tied head -> key of the embedding whose pairs it borrows.
        notes: sentences to print under the plan.

    Raises:
        TargetError: if sites that would share a pair ask for different ranks or alphas, or a
            convolution's groups do not divide a rank.
    """
    levels = tuple(levels)
    kinds = _kinds(sites, levels, levels_of or {}, own_rank)
    pairs: dict[str, list[Pair]] = {level.name: [] for level in levels}
    for kind in kinds:
        for level in kind.levels:
            _check_rank(kind, level)
            groups: dict[int, list[Site]] = defaultdict(list)
            for depth, site in enumerate(kind.sites):
                groups[level.group_of(depth, kind.layers)].append(site)
            pairs[level.name] += [
                Pair(
                    address=f"{level.name}/{group}/{kind.name}",
                    level=level.name,
                    group=group,
                    kind=kind.name,
                    rank=level.rank,
                    scale=level.scale,
                    shape=kind.shape,
                    sites=tuple(site.key for site in members),
                    blocks=tuple(site.block for site in members),
                )
                for group, members in sorted(groups.items())
            ]
    return Plan(
        levels=levels,
        kinds=kinds,
        pairs=tuple(pair for level in levels for pair in pairs[level.name]),
        use_dora=use_dora,
        tied=tuple(sorted((tied or {}).items())),
        notes=(*notes, *_few_layers(kinds)),
    )


def _kinds(
    sites: Iterable[Site],
    levels: tuple[Level, ...],
    levels_of: Mapping[str, tuple[Level, ...]],
    own_rank: Collection[str],
) -> tuple[Kind, ...]:
    members: dict[tuple[str, str, Shape], list[Site]] = defaultdict(list)
    for site in sites:
        members[site.stack, site.kind, site.shape].append(site)

    shapes: dict[tuple[str, str], int] = defaultdict(int)  # (stack, path) -> number of shapes
    for stack, path, _ in members:
        shapes[stack, path] += 1

    def local_name(stack: str, path: str, shape: Shape) -> str:
        return path if shapes[stack, path] == 1 else f"{path}[{shape}]"

    stacks: dict[str, set[str]] = defaultdict(set)  # name -> the stacks that use it
    for key in members:
        stacks[local_name(*key)].add(key[0])

    kinds = []
    for (stack, path, shape), found in members.items():
        name = local_name(stack, path, shape)
        found.sort(key=lambda site: (-1 if site.block is None else site.block, site.key))
        kinds.append(
            Kind(
                name=name if len(stacks[name]) == 1 else f"{stack}:{name}",
                stack=stack,
                path=path,
                shape=shape,
                levels=_levels_of_kind(name, found, levels, levels_of),
                sites=tuple(found),
                own_rank=any(site.key in own_rank for site in found),
            )
        )
    return tuple(sorted(kinds, key=lambda kind: (kind.stack, kind.path, str(kind.shape))))


def _levels_of_kind(
    name: str,
    sites: list[Site],
    levels: tuple[Level, ...],
    levels_of: Mapping[str, tuple[Level, ...]],
) -> tuple[Level, ...]:
    wanted = {site.key: levels_of.get(site.key, levels) for site in sites}
    if len(set(wanted.values())) > 1:
        described = {
            tuple((level.rank, level.alpha) for level in its): key for key, its in wanted.items()
        }
        examples = "; ".join(f"{key}: {list(asked)}" for asked, key in described.items())
        raise TargetError(
            f"rank_pattern/alpha_pattern give the sites of kind {name!r} different (rank, alpha) "
            f"per level ({examples}), but they share their pairs. Write patterns that hold for "
            f"every layer of a kind, such as '{name.rpartition('.')[2]}'."
        )
    return next(iter(wanted.values()))


def _check_rank(kind: Kind, level: Level) -> None:
    if kind.shape.layout == "conv" and level.rank % kind.shape.blocks:
        raise TargetError(
            f"kind {kind.name!r} is a convolution with {kind.shape.blocks} groups, which must "
            f"divide every rank, but level {level.name!r} has rank {level.rank}. Choose ranks that "
            f"are multiples of {kind.shape.blocks}, or leave this kind out with exclude_modules."
        )


def _few_layers(kinds: Sequence[Kind]) -> list[str]:
    """Say where the pyramid costs as much as LoRA, or more: a sentence for all kinds alike."""
    alike: dict[str, list[str]] = defaultdict(list)
    for kind in kinds:
        rank = kind.levels[0].rank
        lora = kind.layers * kind.shape.parameters(rank)
        if kind.parameters >= lora:
            share = f"{kind.parameters / lora:.0%} of what LoRA r = {rank} does"
            alike[f"with {kind.layers} layer(s) the pyramid trains {share}"].append(kind.name)
    return [f"{', '.join(names)}: {said}." for said, names in alike.items()]
