"""What the user asks for: `MSPLoraConfig`, and every check that needs no model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import LoraConfig

from . import _peft
from .errors import ConfigError, UnsupportedError, nearest
from .patterns import check_patterns
from .pyramid import PER_LAYER, Level

FORMAT_VERSION = 1
"""The version of the adapter's file format: tensor names, and the fields of the config."""

DEFAULT_RANK = 8
DEFAULT_ALPHA = 16
PAPER_GROUPS = (1, 3, PER_LAYER)
_LISTS = ("levels", "ranks", "groups", "alphas")
_OF_THE_BASE = ("model_type", "fingerprint")

# What LoraConfig offers that a pyramid refuses: field -> (values that do not ask for it, why not).
_ADAPT_THE_BASE = "it starts from this layer's own base weight, which shared pairs cannot all do"
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "lora_bias": ((False, None), "a pair has no bias of its own; use bias='msplora_only'"),
    "layer_replication": ((None, []), "replicated layers change the depth that groups are cut by"),
    "megatron_config": ((None,), "Megatron's parallel layers split a pair that is shared"),
    "loftq_config": ((None, {}), _ADAPT_THE_BASE),
    "eva_config": ((None,), _ADAPT_THE_BASE),
    "corda_config": ((None,), _ADAPT_THE_BASE),
    "lora_ga_config": ((None,), _ADAPT_THE_BASE),
    "use_qalora": ((False, None), "it pools each layer's input for its own quantised groups"),
    "alora_invocation_tokens": ((None, []), "activated LoRA needs its own forward pass"),
    "arrow_config": ((None,), "Arrow routes between plain LoRA adapters"),
    "use_bdlora": ((None, False), "its block-diagonal factors cannot be stacked"),
    "velora_config": ((None,), "it compresses the activations of one LoRA pair"),
    "kasa_config": ((None,), _ADAPT_THE_BASE),
    "monteclora_config": ((None,), "it samples around one LoRA pair"),
}
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
_REWRITE_THE_BASE = ("pissa", "olora", "eva", "corda", "loftq", "lora_ga", "mica")


@dataclass
class MSPLoraConfig(LoraConfig):
    """A pyramid of shared low-rank pairs (MSPLoRA, arXiv 2503.21838).

    `MSPLoraConfig(r=8, lora_alpha=16, target_modules=[...])` is the paper's pyramid: a pair of
    rank r shared by all layers, pairs of rank r // 2 shared by three groups of layers, and a pair
    of rank r // 4 for each layer, every level scaled by alpha / rank. The long form gives lists,
    one entry per level. Fields not described here mean what they mean in PEFT's `LoraConfig`; what
    a pyramid cannot do is refused with the reason.

    Dropout draws one mask per layer, on the input of the assembled product. For each level that is
    the same in distribution as the released code's one mask per level.

    Raises:
        ConfigError: the fields contradict each other.
        UnsupportedError: a feature of LoRA that a pyramid does not have.
    """

    r: int | None = field(  # pyright: ignore[reportAssignmentType]
        default=None,
        metadata={"help": "Rank of the first level (default 8); the short form's others derive."},
    )
    lora_alpha: float | None = field(  # pyright: ignore[reportAssignmentType]
        default=None,
        metadata={"help": "Alpha of every level (default 16), or their sum with split_alpha."},
    )
    bias: Literal["none", "all", "lora_only", "msplora_only"] = field(
        default="none",
        metadata={"help": "Which biases train: 'none', 'all', or those of the adapted layers."},
    )
    levels: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the levels, [a-z0-9_]+; by default made of groups: 'global' for 1, "
            "'local' for 0, else 'mid', and numbered where there are several."
        },
    )
    ranks: list[int] | None = field(
        default=None, metadata={"help": "Rank of each level; [r, r // 2, r // 4] by default."}
    )
    groups: list[int] | None = field(
        default=None,
        metadata={
            "help": "Groups of each level: 1 = shared by all layers, k = k contiguous groups, "
            "0 = one pair per layer; [1, 3, 0] by default."
        },
    )
    alphas: list[float] | None = field(
        default=None, metadata={"help": "Alpha of each level; lora_alpha at each by default."}
    )
    split_alpha: bool = field(
        default=False,
        metadata={
            "help": "Share lora_alpha out equally over the levels, so that a learning rate "
            "that LoRA of that alpha stands is safe here."
        },
    )
    model_type: str | None = field(
        default=None, metadata={"help": "The base's architecture; filled in when adapted."}
    )
    fingerprint: str | None = field(
        default=None,
        metadata={"help": "Hash of the sites' names and shapes; filled in when adapted."},
    )
    format_version: int = field(
        default=FORMAT_VERSION, metadata={"help": "Version of the adapter's file format."}
    )

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ConfigError(
                f"the adapter has format_version {self.format_version}; this msplora reads "
                f"version {FORMAT_VERSION}. Install the msplora that wrote it, or a newer one."
            )
        for name in _OF_THE_BASE:
            if isinstance(getattr(self, name), _FilledInText):  # in what `replace` was called on
                setattr(self, name, None)
        # What the file, if any, says of the base it was made for; the fields are filled in anew.
        self._made_for = (self.model_type, self.fingerprint)
        self._refuse_what_a_pyramid_cannot_do()
        self._fill_in_levels()
        super().__post_init__()
        self.peft_type = _peft.register_type()

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, which any writer of JSON or YAML takes."""
        fields = super().to_dict()
        for name in _LISTS:
            fields[name] = list(fields[name])
        for name in _OF_THE_BASE:
            fields[name] = None if fields[name] is None else str(fields[name])
        return fields

    def record_base(self, model_type: str | None, fingerprint: str) -> None:
        """Say of which base the adapter is, once it is put on it.

        `dataclasses.replace` leaves that behind: what it makes goes on a base of its own.
        """
        self.model_type = None if model_type is None else _FilledInText(model_type)
        self.fingerprint = _FilledInText(fingerprint)

    @property
    def pyramid(self) -> tuple[Level, ...]:
        """The levels asked for, first to last.

        Raises:
            ConfigError: `r` or `lora_alpha` was set after the levels had been made of it.
        """
        self._refuse_late_changes()
        levels: Any = zip(self.levels, self.ranks, self.groups, self.alphas, strict=True)  # pyright: ignore
        return tuple(
            Level(name=name, rank=rank, groups=groups, alpha=alpha, use_rslora=self.use_rslora)
            for name, rank, groups, alpha in levels
        )

    def pyramid_with(self, rank: int | None, alpha: float | None) -> tuple[Level, ...]:
        """The levels of a kind for which a pattern asks for another rank or alpha.

        `rank` is the first level's; the others follow in proportion (in the short form: halved).
        `alpha` stands in for `lora_alpha`: the levels' alphas change in the same proportion.
        """
        ranks = [level.rank for level in self.pyramid]
        alphas = [level.alpha for level in self.pyramid]
        r: Any = self.r
        lora_alpha: Any = self.lora_alpha
        if rank is not None and rank != r:
            ranks = _halved(rank) if ranks == _halved(r) else [rank * its // r for its in ranks]
            if min(ranks) < 1:
                raise ConfigError(
                    f"rank_pattern asks for r = {rank}, which gives the levels {self.levels} the "
                    f"ranks {ranks}; each must be at least 1. Ask for a larger rank."
                )
        if alpha is not None:
            alphas = [its * alpha / lora_alpha for its in alphas]
        return tuple(
            Level(
                level.name,
                rank=its_rank,
                groups=level.groups,
                alpha=its_alpha,
                use_rslora=self.use_rslora,
            )
            for level, its_rank, its_alpha in zip(self.pyramid, ranks, alphas, strict=True)
        )

    def _refuse_late_changes(self) -> None:
        ranks: Any = self.ranks
        alphas: Any = self.alphas
        meant = {"r": ranks[0]}
        if isinstance(alphas, _FilledIn):
            meant["lora_alpha"] = sum(alphas) if self.split_alpha else alphas[0]
        for name, value in meant.items():
            if not math.isclose(found := getattr(self, name), value):
                raise ConfigError(
                    f"{name} is {found} and the levels were made of {value} (ranks = {ranks}, "
                    f"alphas = {alphas}): a finished config was changed. Make another: "
                    f"dataclasses.replace(config, {name}={found})."
                )

    def _fill_in_levels(self) -> None:
        for name in _LISTS:
            its = getattr(self, name)
            if isinstance(its, _FilledIn) and its.untouched:  # `replace(config, r=16)`
                setattr(self, name, None)
        if isinstance(self.r, list):
            raise ConfigError(
                f"r = {self.r}: this is how the code released with the paper writes its ranks. "
                f"Convert its checkpoint (msplora convert FOLDER OUT --to msplora, or lora); for a "
                f"new adapter say ranks={self.r}."
            )
        given = [name for name in ("groups", "alphas", "levels") if getattr(self, name) is not None]
        if self.ranks is None:
            self.r = DEFAULT_RANK if self.r is None else self.r
            _check_rank("r", self.r)
            self.ranks = _FilledIn(_halved(self.r))
            if min(self.ranks) < 1:
                raise ConfigError(
                    f"r = {self.r} leaves no rank for the third level of the short form "
                    f"(r, r // 2, r // 4 = {self.ranks}); r must be at least 4. For smaller ranks "
                    f"write the levels out: MSPLoraConfig(ranks=[{self.r}, 1, 1], "
                    f"groups=[1, 3, 0], ...)."
                )
        else:
            self.ranks = _as_list("ranks", self.ranks)
            for rank in self.ranks:
                _check_rank("ranks", rank)
            if not self.ranks:
                raise ConfigError("ranks is empty; give one rank per level.")
            if self.r is not None and self.r != self.ranks[0]:
                raise ConfigError(
                    f"r = {self.r}, but ranks = {self.ranks}: r is the first level's rank. "
                    f"Leave r out, or make them agree."
                )
            self.r = self.ranks[0]
        count = len(self.ranks)

        if self.groups is None:
            if count != len(PAPER_GROUPS):
                raise ConfigError(
                    f"ranks = {self.ranks} gives {count} level(s); say with groups how many groups "
                    f"each has (1 = shared by all layers, k = k groups, 0 = one pair per layer)."
                )
            self.groups = _FilledIn(PAPER_GROUPS)
        self.groups = _as_list("groups", self.groups)
        for groups in self.groups:
            if not _is_int(groups) or groups < 0:
                raise ConfigError(
                    f"groups = {self.groups}: each must be a whole number, 0 (one pair per layer) "
                    f"or more."
                )
        self._fill_in_alphas(count)
        if self.levels is None:
            self.levels = _FilledIn(_level_names(self.groups))
        self.levels = _as_list("levels", self.levels)

        lengths = {name: len(getattr(self, name)) for name in ("ranks", *given)}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ConfigError(f"the lists must have one entry per level, but {found}.")
        for name in self.levels:
            if not re.fullmatch(r"[a-z0-9_]+", str(name)) or "msplora_" in name:
                raise ConfigError(
                    f"level name {name!r}: use small letters, digits and underscores, and not "
                    f"'msplora_', which marks the adapter's tensors."
                )
        if len(set(self.levels)) < count:
            raise ConfigError(f"levels = {self.levels}: every level needs its own name.")

    def _fill_in_alphas(self, count: int) -> None:
        if self.alphas is None:
            self.lora_alpha = DEFAULT_ALPHA if self.lora_alpha is None else self.lora_alpha
            _check_alpha("lora_alpha", self.lora_alpha)
            share = self.lora_alpha / count if self.split_alpha else self.lora_alpha
            self.alphas = _FilledIn([share] * count)
            return
        self.alphas = _as_list("alphas", self.alphas)
        for alpha in self.alphas:
            _check_alpha("alphas", alpha)
        if not self.alphas:
            raise ConfigError("alphas is empty; give one alpha per level.")
        stated = sum(self.alphas) if self.split_alpha else self.alphas[0]
        if self.lora_alpha is None:
            self.lora_alpha = stated
        if self.split_alpha:
            share = self.lora_alpha / len(self.alphas)
            if not all(math.isclose(alpha, share, rel_tol=1e-6) for alpha in self.alphas):
                raise ConfigError(
                    f"split_alpha=True shares lora_alpha = {self.lora_alpha} out equally, "
                    f"{share:g} to each level, but alphas = {self.alphas}. Give one or the other."
                )
        elif self.lora_alpha != stated:
            raise ConfigError(
                f"lora_alpha = {self.lora_alpha}, but alphas = {self.alphas}: lora_alpha is the "
                f"first level's alpha. Leave lora_alpha out, or make them agree."
            )

    def _refuse_what_a_pyramid_cannot_do(self) -> None:
        for name, (neutral, reason) in _REFUSED.items():
            value = getattr(self, name, neutral[0])
            if not any(value is its or value == its for its in neutral):
                raise UnsupportedError(f"MSPLoRA does not support {name}={value!r}: {reason}.")
        init = self.init_lora_weights
        if init not in _INITIALISATIONS:
            if str(init).lower().startswith(_REWRITE_THE_BASE):
                raise UnsupportedError(
                    f"MSPLoRA does not support init_lora_weights={init!r}: {_ADAPT_THE_BASE}. Use "
                    f"one of {list(_INITIALISATIONS)}."
                )
            raise ConfigError(
                f"init_lora_weights={init!r}: use one of {list(_INITIALISATIONS)}."
                f"{nearest(str(init), ['gaussian', 'orthogonal'])}"
            )
        if self.bias not in ("none", "all", "lora_only", "msplora_only"):
            raise ConfigError(
                f"bias={self.bias!r}: use 'none', 'all', 'lora_only' or 'msplora_only' (the last "
                f"two mean the same: the biases of the adapted layers)."
            )
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                f"lora_dropout = {self.lora_dropout!r}: a probability from 0 to below 1."
            )
        for rank in (self.rank_pattern or {}).values():
            _check_rank("rank_pattern", rank)
        for alpha in (self.alpha_pattern or {}).values():
            _check_alpha("alpha_pattern", alpha)
        check_patterns(self)
        if self.target_parameters:
            for name, neutral in (("lora_dropout", 0), ("use_dora", False)):
                if getattr(self, name) != neutral:
                    raise UnsupportedError(
                        f"{name}={getattr(self, name)!r} does not work with target_parameters (in "
                        f"PEFT's LoRA neither): the delta is added to the parameter itself. Set "
                        f"{name}={neutral}."
                    )


class _FilledIn(list):
    """A list that nobody gave. `dataclasses.replace` hands on all fields, and must not find one
    that was derived from the old `r` or `lora_alpha` at odds with the new."""

    def __init__(self, values: Iterable[Any] = ()) -> None:
        super().__init__(values)
        self.made = tuple(self)

    @property
    def untouched(self) -> bool:
        return tuple(self) == self.made


class _FilledInText(str):
    """A text about the base that an injection filled in, which goes for that base alone."""


def _halved(rank: int) -> list[int]:
    """The short form's ranks: r, r // 2, r // 4."""
    return [rank, rank // 2, rank // 4]


def _level_names(groups: list[int]) -> list[str]:
    """By how many groups a level has, numbered where several have the same name."""
    names = [{1: "global", PER_LAYER: "local"}.get(count, "mid") for count in groups]
    return [
        name if names.count(name) == 1 else f"{name}{names[:place].count(name)}"
        for place, name in enumerate(names)
    ]


def _as_list(name: str, value: Any) -> list:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{name} = {value!r}: give a list with one entry per level.")
    return value if isinstance(value, _FilledIn) else list(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_rank(name: str, rank: object) -> None:
    if not _is_int(rank) or rank < 1:  # pyright: ignore[reportOperatorIssue]
        raise ConfigError(f"{name} holds {rank!r}; a rank is a whole number, 1 or more.")


def _check_alpha(name: str, alpha: object) -> None:
    if not _is_number(alpha) or not math.isfinite(alpha) or alpha <= 0:  # pyright: ignore
        raise ConfigError(f"{name} holds {alpha!r}; an alpha is a finite number above 0.")
