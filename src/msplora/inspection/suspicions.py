"""By which rule something is suspicious, and what is said then.

A *problem* keeps an adapter from being loaded, or from doing anything; a *warning* is unusual; a
*note* is what a reader of the figures should know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from msplora.classifier_head import may_be_head
from msplora.matching import HEADS

from .results import Finding, PairReport

LARGE = 1.0
"""A relative norm above this is exploded: the update is as large as an identity of its size."""
OUTLIER = 10.0
"""So is one above this many times the median of its level (at least `FEWEST` pairs)."""
FEWEST = 4
_SHOWN = 3
_AGAIN = "The file is not whole, or not this config's; save or copy it again."

MAGNITUDES = ("lora_magnitude_vector", "msplora_magnitude")
"""What the names of DoRA's tensors hold."""

UNEVEN = "uneven kinds"
NOT_WHOLE = ("missing pair", "missing part", "unused pair", "misshapen")
"""The rules by which a file is not what its config asks for."""

RULES = {
    "missing pair": "the config's pyramid has a pair that the file lacks, or holds half of",
    "missing part": "the config asks for a head, trained tokens or DoRA's magnitudes, and the file "
    "has no tensor of them",
    "unused pair": "the file holds a pair that no layer borrows",
    "missing target": "the config's target_modules list a name that no pair of the file is for",
    "missing layer": "a kind has not as many layers as layers_to_transform lists, or a LoRA lacks "
    "a block before the last, or one that others of the same module have",
    "misshapen": "A and B have no product, not the config's rank, or another width than their kind",
    "not finite": "a tensor holds a NaN or an infinity",
    "no effect": "every pair's product is zero: the adapter changes nothing",
    "zero B": "a pair's B is zero, as at the start: it has learned nothing",
    "zero product": "A is zero, or the scale is, or A and B are not and their product is, but for "
    "rounding",
    "exploded norm": f"‖s·BA‖ / √min(out, in) above {LARGE:g}, or above {OUTLIER:g} times the "
    f"median of its level ({FEWEST} pairs or more)",
    "base not found": "the base that the adapter names is a path, and there is nothing",
    "unmerged": "a whole model's file holds an adapter's tensors beside the weights",
    "missing tensor": "the index of a model in parts, or a file or a tensor that it names, is not "
    "there",
    "other weights": "files of a model saved in other parts lie beside those that transformers "
    "reads",
    "zero weight": "a matrix of a model holds zeros only",
    "exploded weight": f"a matrix's norm is above {OUTLIER:g} times the median of the same place "
    f"in all blocks ({FEWEST} or more)",
    UNEVEN: "kinds have different numbers of layers",
    "note": "what the figures do not say",
}
"""The rules by name."""


def note(text: str, *where: str) -> Finding:
    """What a reader of the figures should know."""
    return Finding("note", "note", text, where)


def missing(addresses: Sequence[str], whole: bool) -> list[Finding]:
    """Pairs that the config asks for; `whole` is whether there is any pair at all."""
    if not whole:
        return [Finding("missing pair", "problem", f"The file holds no low-rank pair. {_AGAIN}")]
    if not addresses:
        return []
    levels = sorted({its.partition("/")[0] for its in addresses if its.count("/") > 1})
    of = f" of the level(s) {', '.join(levels)}" if levels else ""
    text = f"The file lacks {len(addresses)} pair(s){of}, or half of them: {some(addresses)}. "
    text += _AGAIN
    return [Finding("missing pair", "problem", text, tuple(addresses))]


def missing_parts(config: Any, others: Sequence[str]) -> list[Finding]:
    """What the config asks for beside the pairs and has no tensor of among the `others`."""
    saved = list(dict.fromkeys(config.modules_to_save or ()))
    # PEFT goes by how a module's path ends. It names two heads for every classifier, of which a
    # model has one; or none, where its head is another of the modules that were trained.
    heads = [name for name in saved if name in HEADS]
    parts = [[name] for name in saved if name not in heads]
    answering = [name for [name] in parts if may_be_head(name)]
    if heads and not any(f"{name}." in its for name in answering for its in others):
        parts.append(heads)
    asked = {
        f"a module of modules_to_save ({', '.join(names)})": [f"{name}." for name in names]
        for names in parts
    }
    if config.use_dora:
        asked["DoRA's magnitudes (use_dora)"] = list(MAGNITUDES)
    if getattr(config, "trainable_token_indices", None):
        asked["trained tokens (trainable_token_indices)"] = ["trainable_tokens"]
    return [
        Finding("missing part", "problem", f"The file has no tensor of {what}. {_AGAIN}")
        for what, marks in asked.items()
        if not any(mark in name for mark in marks for name in others)
    ]


def left_over(addresses: Sequence[str]) -> list[Finding]:
    """Pairs beyond the config's pyramid."""
    if not addresses:
        return []
    text = (
        f"{len(addresses)} pair(s) are used by no layer: {some(addresses)} are beyond the pyramid "
        f"of the config. {_AGAIN}"
    )
    return [Finding("unused pair", "problem", text, tuple(addresses))]


def misshapen(found: Mapping[str, str]) -> list[Finding]:
    """Pairs by address, and what is wrong with each."""
    if not found:
        return []
    first = next(iter(found))
    text = f"{len(found)} pair(s) do not fit the config or their kind: {first} has {found[first]}. "
    text += _AGAIN
    return [Finding("misshapen", "problem", text, tuple(found))]


def not_finite(names: Sequence[str]) -> list[Finding]:
    """Tensors that hold a NaN or an infinity."""
    if not names:
        return []
    text = (
        f"{len(names)} tensor(s) hold values that are not finite: {some(names)}. The training "
        f"diverged, or the dtype is too small; train again with a lower learning rate."
    )
    return [Finding("not finite", "problem", text, tuple(names))]


def unknown_scales(config: Any) -> Finding:
    """Patterns for single layers, of which the file alone does not tell which pairs they mean."""
    patterns = [*(config.rank_pattern or ()), *(config.alpha_pattern or ())]
    return note(
        f"rank_pattern or alpha_pattern ({some(patterns)}) names weights by paths that the file "
        f"does not have: ranks and scales are taken to be the config's own."
    )


def uneven(layers: Mapping[str, int]) -> list[Finding]:
    """Kinds, and how many layers each has: the loss of a level's last pair shows only here."""
    if len(set(layers.values())) < 2:
        return []
    fewest, most = min(layers, key=layers.__getitem__), max(layers, key=layers.__getitem__)
    text = (
        f"Kinds have different numbers of layers ({fewest} {layers[fewest]}, {most} "
        f"{layers[most]}). If the model's blocks are all alike, the file lacks pairs."
    )
    return [Finding(UNEVEN, "note", text, tuple(layers))]


def without_effect(pairs: Sequence[PairReport]) -> list[Finding]:
    """Pairs whose product is zero."""
    measured = [pair for pair in pairs if pair.norm is not None]
    still = [pair for pair in measured if pair.norm == 0]
    if measured and len(still) == len(measured):
        text = (
            f"All {len(still)} pairs are zero: the adapter changes nothing. It was saved before it "
            f"was trained, or its parameters were not trainable."
        )
        if all(pair.scale == 0 for pair in still):
            text = (
                f"The scale of all {len(still)} pairs is 0: the adapter changes nothing. The "
                f"config's alpha (lora_alpha or alpha_pattern) is 0."
            )
        return [Finding("no effect", "problem", text, tuple(pair.address for pair in still))]
    found = []
    # A LoRA written for servers has pairs of zeros where a layer is not adapted: no B was left out.
    padding = [pair.address for pair in still if pair.zero == ("A", "B") and pair.level == "lora"]
    if padding:
        found.append(
            note(
                f"{len(padding)} pair(s) are zero in A and B, such as {padding[0]}: layers that "
                f"are not adapted, which servers want to be there.",
                *padding,
            )
        )
    untrained = [its.address for its in still if "B" in its.zero and its.address not in padding]
    if untrained:
        text = (
            f"B is zero in {len(untrained)} of {len(pairs)} pairs: {some(untrained)}. They have "
            f"learned nothing; were they frozen, or are their layers never run?"
        )
        found.append(Finding("zero B", "warning", text, tuple(untrained)))
    scaled = [its.address for its in still if "B" not in its.zero and its.scale == 0]
    if scaled:
        text = (
            f"The scale is 0 in {len(scaled)} of {len(pairs)} pairs: {some(scaled)}. They change "
            f"nothing: the config's alpha (lora_alpha or alpha_pattern) is 0 there."
        )
        found.append(Finding("zero product", "warning", text, tuple(scaled)))
    others = [its.address for its in still if "B" not in its.zero and its.scale]
    if others:
        text = (
            f"The product is zero in {len(others)} of {len(pairs)} pairs: {some(others)}. They "
            f"change nothing."
        )
        found.append(Finding("zero product", "warning", text, tuple(others)))
    return found


def exploded(pairs: Sequence[PairReport]) -> list[Finding]:
    """Pairs whose update is as large as a weight, or far larger than its level's others."""
    by_level: dict[str, list[PairReport]] = {}
    for pair in pairs:
        if pair.relative_norm:
            by_level.setdefault(pair.level, []).append(pair)
    found: dict[str, str] = {}
    for level, its in by_level.items():
        middle = median(pair.relative_norm or 0 for pair in its)
        for pair in its:
            norm = pair.relative_norm or 0
            if norm > LARGE:
                found[pair.address] = f"{norm:.3g} times an identity's of its size"
            elif len(its) >= FEWEST and norm > OUTLIER * middle:
                found[pair.address] = f"{norm / middle:.3g} times the median of level {level}"
    if not found:
        return []
    first = max(found, key=lambda its: next(p.norm or 0 for p in pairs if p.address == its))
    text = (
        f"The norm of {len(found)} of {len(pairs)} pairs has exploded: {first}'s is "
        f"{found[first]}. Look at the loss of its training; a lower learning rate, or split_alpha, "
        f"keeps updates small."
    )
    return [Finding("exploded norm", "warning", text, tuple(found))]


def some(names: Sequence[str]) -> str:
    """The first few of a list."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
