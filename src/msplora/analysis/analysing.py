"""`msplora.analyse`: from adapters' folders to everything that is found of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import combinations
from math import prod
from pathlib import Path

from msplora import __version__
from msplora.errors import AdapterFileError, MSPLoraError
from msplora.extras import train_extra
from msplora.loading import BaseOptions, adapter_folder

from .against_base import Weights, weights_of, with_base
from .base import Base
from .comparing import compare
from .history import checkpoint_folders, over_training, read_history, step_of
from .kinds import analyse_kind
from .reading import read_adapter
from .results import Ablation, AdapterResult, Analysis, KindResult
from .stored import StoredAdapter
from .summary import summarise
from .too_large import check_norms, products_that_are_numbers

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many of its steps are done, and of how many."""


def analyse(
    *adapters: str | Path,
    base: str | Path | BaseOptions | None = None,
    intruder_vectors: int = 10,
    data: str | Path | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> Analysis:
    """Measure what the levels of adapters learned, through their factors.

    No model is loaded but for `data`. The factors are read from the files as they are needed; what
    is held at a time is one kind in the coordinates of its factors and, with a base, one of its
    weights.

    Args:
        adapters: folders of MSPLoRA adapters or PEFT's plain LoRAs, or of runs; one that has
            checkpoints only stands for its last that is whole.
        base: the base model, for norms relative to its weights and intruder dimensions; a folder,
            an id on the hub, or how to load it.
        intruder_vectors: how many leading singular vectors of each adapted weight are compared with
            the base's; 0 leaves it out, which takes a dense decomposition of each, and one of the
            base's weight for all adapters.
        data: rows, as `msplora eval` takes them, on which each level is switched off in turn.
        progress: called as the work goes on.
        notify: told, before it is done, in a sentence, of what may take hours.

    Returns:
        Frozen values; `to_dict()`, `to_html()` and `write()` give them away.

    Raises:
        MSPLoraError: an adapter, its base or the data cannot be read, or do not fit each other.
    """
    if not adapters:
        raise MSPLoraError("there is no adapter to analyse: give the folder of at least one.")
    if intruder_vectors < 0:
        raise MSPLoraError(f"intruder_vectors is {intruder_vectors}: it has to be 0 or more.")
    options = BaseOptions.of(base)
    rows = None if data is None else str(data)
    report = progress or _silent
    paths = [Path(path).expanduser() for path in adapters]
    names = _names(paths)
    # All is read before anything is computed: what is wrong with the last is said at once.
    read = [_read(path, options) for path in paths]
    for adapter, its_base in read:
        if its_base is not None:
            its_base.check_weights(site.key for kind in adapter.kinds for site in kind.sites)
    weights = weights_of(read)
    said = _decompositions(weights, intruder_vectors)
    if said and notify is not None:
        notify(said)
    histories = [
        read_history(path, adapter, options) for path, (adapter, _) in zip(paths, read, strict=True)
    ]
    # Before the rest, of all adapters: it loads most, and so may fail.
    ablations = [
        _ablation(adapter.path, rows, options, partial(report, f"{name}: data"))
        for name, (adapter, _) in zip(names, read, strict=True)
    ]
    of_factors = [
        _kinds(adapter, partial(report, f"{name}: updates"))
        for name, (adapter, _) in zip(names, read, strict=True)
    ]
    beside_base = with_base(
        of_factors, read, weights, intruder_vectors, partial(report, "the base's weights")
    )
    results = []
    for name, path, (adapter, its_base), kinds, history, ablation in zip(
        names, paths, read, beside_base, histories, ablations, strict=True
    ):
        course, of_course = over_training(history, partial(report, f"{name}: checkpoints"))
        results.append(
            AdapterResult(
                name=name,
                path=str(path),
                method=adapter.method,
                base=its_base.source if its_base else adapter.base,
                parameters=sum(pair.parameters for kind in adapter.kinds for pair in kind.pairs),
                levels=summarise(
                    adapter,
                    [list(site.levels.values()) for kind in kinds for site in kind.sites],
                ),
                kinds=kinds,
                history=course,
                ablation=ablation,
                notes=(
                    *adapter.notes,
                    *of_course,
                    *_notes(adapter, kinds, its_base),
                    *_of_rows(ablation),
                ),
            )
        )
    pairs = list(combinations(range(len(read)), 2))
    comparisons = []
    for done, (one, other) in enumerate(pairs, start=1):
        adapters_of = read[one][0], read[other][0]
        comparisons.append(compare(*adapters_of, (names[one], names[other])))
        report("comparing", done, len(pairs))
    return Analysis(tuple(results), tuple(comparisons), __version__)


def _decompositions(weights: Weights, intruder_vectors: int) -> str:
    """What the search for intruder dimensions takes, in a sentence; empty where there is none."""
    if not weights or not intruder_vectors:
        return ""
    adapted = sum(map(len, weights.values()))
    largest = max((shape for *_, shape in weights), key=prod)
    return (
        f"Intruder dimensions take {len(weights) + adapted:,} dense singular value decompositions, "
        f"of {len(weights):,} weights of the base and of {adapted:,} adapted ones, of up to "
        f"{largest[0]:,} × {largest[1]:,}: two of 4,096 × 4,096 take 42 s on one core. "
        f"--intruders 0 leaves them out."
    )


def _read(path: Path, base: BaseOptions) -> tuple[StoredAdapter, Base | None]:
    """The adapter itself: given, or a run's, or that of the last checkpoint that is whole."""
    try:
        folder = adapter_folder(path)
    except MSPLoraError:
        checkpoints = checkpoint_folders(path)
        if not checkpoints:
            raise
        return _last_whole(checkpoints, base)
    return read_adapter(folder, base)


def _last_whole(
    checkpoints: Sequence[Path], base: BaseOptions
) -> tuple[StoredAdapter, Base | None]:
    """The last that can be read: the one that was saved when a process ended may be cut short."""
    *earlier, last = checkpoints
    try:
        return read_adapter(last, base)
    except AdapterFileError as error:
        for folder in reversed(earlier):
            with suppress(AdapterFileError):
                found, its_base = read_adapter(folder, base)
                note = f"It is analysed as of step {step_of(folder)}: no later checkpoint is whole."
                return replace(found, notes=(note, *found.notes)), its_base
        raise error


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(its[-length:]) for its in parts]
        if len(set(names)) == len(names):
            return names
    raise MSPLoraError(
        f"{str(paths[0])!r} is given more than once; give each adapter once."
        if len(set(parts)) == 1
        else "an adapter is given more than once; give each once."
    )


def _kinds(adapter: StoredAdapter, report: Callable[[int, int], None]) -> tuple[KindResult, ...]:
    total = sum(len(kind.sites) for kind in adapter.kinds)
    done = 0
    found = []
    for kind in adapter.kinds:
        with products_that_are_numbers(adapter.path, kind.name):
            its = analyse_kind(kind, adapter.levels)
        for site in its.sites:
            check_norms(adapter.path, site.key, [site.update, *site.levels.values()])
        found.append(its)
        done += len(kind.sites)
        report(done, total)
    return tuple(found)


def _ablation(
    folder: Path, data: str | None, base: BaseOptions, report: Callable[[int, int], None]
) -> Ablation | None:
    if data is None:
        return None
    with train_extra():
        from .ablation import switch_off

        return switch_off(folder, data, base, report)


def _of_rows(ablation: Ablation | None) -> list[str]:
    if ablation is None or not ablation.left_out:
        return []
    from .ablation import left_out_in_words

    return [left_out_in_words(ablation)]


def _notes(adapter: StoredAdapter, kinds: Sequence[KindResult], base: Base | None) -> list[str]:
    sites = [site for kind in kinds for site in kind.sites]
    notes = []
    still = [site.key for site in sites if site.update.norm == 0]
    if still:
        scaled = any(pair.scale for kind in adapter.kinds for pair in kind.pairs)
        notes.append(
            f"{len(still)} of {len(sites)} weights are not changed at all, such as {still[0]}: "
            + (
                "B, or A, or alpha is zero there, or B A is but for rounding."
                if scaled
                else "the scale of every pair is 0, as alpha (lora_alpha) is 0."
            )
        )
    if base is not None:
        missing = [site.key for site in sites if site.base_norm is None]
        if missing:
            notes.append(
                f"The base's files hold {len(missing)} of the {len(sites)} weights in another form "
                f"or size, or under another name, such as {missing[0]}: they have no relative norm "
                f"and no intruder dimensions."
            )
    return notes


def _silent(what: str, done: int, total: int) -> None:
    pass
