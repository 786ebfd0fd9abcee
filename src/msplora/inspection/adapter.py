"""An adapter's files, looked at one pair at a time: no model, and never a dense update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from msplora.analysis.other_products import beside_the_product, is_bias, other_product
from msplora.analysis.reading_lora import place_of, wrapped
from msplora.analysis.reading_pyramid import path_of
from msplora.config import MSPLoraConfig
from msplora.errors import BaseModelError
from msplora.loading import resolve_source
from msplora.spectrum import as_matrices, is_nothing, norm_of

from .blocks import absent_layers, absent_targets
from .entries import Entries, Entry, entries_of
from .gaps import gaps
from .results import Finding, KindReport, LevelReport, PairReport
from .suspicions import (
    MAGNITUDES,
    exploded,
    misshapen,
    missing_parts,
    not_finite,
    note,
    uneven,
    without_effect,
)
from .tensor_file import TensorFiles
from .widths import of_other_widths


@dataclass(frozen=True)
class AdapterReport:
    """What the files of an adapter hold."""

    levels: tuple[LevelReport, ...]
    kinds: tuple[KindReport, ...]
    pairs: tuple[PairReport, ...]
    parameters: int
    other_parameters: int
    findings: tuple[Finding, ...]


def look_at_adapter(
    files: TensorFiles, config: Any, done: Callable[[int, int], None]
) -> AdapterReport:
    """Measure every pair, and find what is suspicious.

    Args:
        files: the adapter's.
        config: PEFT's, of a LoRA or a pyramid.
        done: told how many tensors have been read, and of how many.
    """
    entries = entries_of(files, config)
    others = [name for name in files.headers if name not in entries.used]
    total = len(entries.pairs) + len(others)
    pairs: list[PairReport] = []
    infinite: list[str] = []
    unfit: dict[str, str] = {}
    for entry in entries.pairs:
        pairs.append(_measured(files, entry, infinite, unfit))
        done(len(pairs), total)
    for place, name in enumerate(others, start=len(pairs) + 1):
        if not files.is_finite(name):
            infinite.append(name)
        done(place, total)
    is_pyramid = isinstance(config, MSPLoraConfig)
    if is_pyramid:  # a LoRA's pairs are each for a weight of its own
        unfit = of_other_widths(files, entries.pairs) | unfit
    findings = [
        *entries.findings,
        *missing_parts(config, others),
        *misshapen(unfit),
        *not_finite(infinite),
        *without_effect(pairs),
        *exploded(pairs),
        *_of_base(config),
        *_notes(config, others),
    ]
    kinds = _kinds(files, entries)
    layers = {kind.kind: kind.layers for kind in kinds if kind.layers}
    if is_pyramid:
        findings += uneven(layers)
    # A pair that is known to be missing is named already.
    if all(its.severity == "note" for its in entries.findings):
        paths = [path_of(its.kind) if is_pyramid else its.address for its in entries.pairs]
        findings += absent_targets(config, paths)
        findings += absent_layers(config, layers)
        if not is_pyramid:
            within = wrapped(paths)
            findings += gaps(config, [place_of(path, config, None, within) for path in paths])
    return AdapterReport(
        _levels(entries, pairs),
        kinds,
        tuple(pairs),
        sum(pair.parameters for pair in pairs),
        sum(files.headers[name].numbers for name in others),
        tuple(findings),
    )


def _measured(
    files: TensorFiles, entry: Entry, infinite: list[str], unfit: dict[str, str]
) -> PairReport:
    """One pair; what is wrong with it goes into the lists."""
    # Of 8-bit floats torch only converts.
    a, b = files.read(entry.a).double(), files.read(entry.b).double()
    bad = [name for name, its in ((entry.a, a), (entry.b, b)) if not bool(its.isfinite().all())]
    infinite += bad
    matrices = matrices_of(a, b, entry)
    norm = relative = None
    if matrices is None:
        unfit[entry.address] = (
            f"A {tuple(a.shape)} and B {tuple(b.shape)}, where its rank is {entry.level.rank}"
        )
    elif not bad:
        a_RI, b_OR = matrices
        nothing = entry.level.scale == 0 or is_nothing(a_RI, b_OR)
        norm = 0.0 if nothing else abs(entry.level.scale) * norm_of(a_RI, b_OR)
        size = min(b_OR.shape[-2], a_RI.shape[-1]) * entry.experts
        relative = norm / math.sqrt(size)
    return PairReport(
        entry.address,
        entry.level.name,
        entry.kind,
        entry.level.rank,
        entry.level.scale,
        a.numel() + b.numel(),
        entry.layers,
        norm,
        relative,
        tuple(name for name, its in (("A", a), ("B", b)) if not bool(its.any())),
    )


def matrices_of(a: Tensor, b: Tensor, entry: Entry) -> tuple[Tensor, Tensor] | None:
    """A and B with a product, (… R, I) and (… O, R); None where they have none of that rank."""
    if entry.experts > 1:
        rows = entry.level.rank * entry.experts
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rows or b.shape[1] != rows:
            return None
        return as_matrices(a, b, experts=entry.experts)
    if a.ndim < 2 or b.ndim != a.ndim or a.shape[0] != entry.level.rank or not b.shape[1]:
        return None
    groups, rest = divmod(a.shape[0], b.shape[1]) if a.ndim > 2 else (1, 0)
    if rest or groups < 1 or (a.ndim == 2 and b.shape[1] != a.shape[0]) or b.shape[0] % groups:
        return None
    return as_matrices(a, b, groups=groups)


def _levels(entries: Entries, pairs: Sequence[PairReport]) -> tuple[LevelReport, ...]:
    squares: dict[str, float] = {}
    for level in entries.levels:
        squares[level.name] = sum(
            (pair.norm or 0) * (pair.norm or 0) * entry.weights  # ** 2 raises where it overflows
            for entry, pair in zip(entries.pairs, pairs, strict=True)
            if pair.level == level.name
        )
    whole = sum(squares.values())
    found = []
    for level in entries.levels:
        its = [pair for pair in pairs if pair.level == level.name]
        weights = sum(entry.weights for entry in entries.pairs if entry.level.name == level.name)
        measured = any(pair.norm is not None for pair in its)
        found.append(
            LevelReport(
                level.name,
                level.groups,
                level.rank,
                level.alpha,
                level.scale,
                len(its),
                sum(pair.parameters for pair in its),
                math.sqrt(squares[level.name] / weights) if measured else None,
                squares[level.name] / whole if 0 < whole < math.inf else None,
                max((p.relative_norm for p in its if p.relative_norm is not None), default=None),
            )
        )
    return tuple(found)


def _kinds(files: TensorFiles, entries: Entries) -> tuple[KindReport, ...]:
    found = []
    by_kind: dict[str, list[Entry]] = {}
    for entry in entries.pairs:
        by_kind.setdefault(entry.kind, []).append(entry)
    for kind, of_kind in by_kind.items():
        first = of_kind[0]
        by_level = [
            [entry for entry in of_kind if entry.level.name == level.name]
            for level in entries.levels
        ]
        layers = max(sum(len(entry.layers) for entry in its) for its in by_level)
        headers = [files.headers[name] for entry in of_kind for name in (entry.a, entry.b)]
        highest, lowest = (
            tuple(of((entry.level.rank for entry in its), default=0) for its in by_level)
            for of in (max, min)
        )
        found.append(
            KindReport(
                kind,
                files.headers[first.b].rows,
                files.headers[first.a].columns,
                layers or (len(of_kind) if entries.levels[0].name == "lora" else None),
                highest,
                lowest,
                tuple(tuple(len(entry.layers) for entry in its) for its in by_level),
                sum(header.numbers for header in headers),
            )
        )
    return tuple(found)


def _of_base(config: Any) -> list[Finding]:
    name = config.base_model_name_or_path
    if not name:
        return [note("The adapter does not name its base: who loads it has to.")]
    try:
        resolve_source(name, "the base")
    except BaseModelError as error:
        return [
            Finding(
                "base not found",
                "warning",
                f"{error} Was it moved? Whoever loads the adapter has to name it then.",
            )
        ]
    return []


def _notes(config: Any, others: Sequence[str]) -> list[Finding]:
    found = []
    what = other_product(config)
    if what:
        found.append(
            note(f"It uses {what}: its update is not s·BA alone, and norms are those of s·BA.")
        )
    rest = [
        name for name in others if not is_bias(name) and not any(its in name for its in MAGNITUDES)
    ]
    if rest:
        found.append(
            note(
                f"{len(rest)} more tensor(s), such as {rest[0]}, are no low-rank pair: a head, "
                f"biases or trained tokens.",
                *rest,
            )
        )
    return [*found, *map(note, beside_the_product(config, others))]
