"""The tables of a bake-off as text: for the terminal, the report and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .bake_off import Outcome
from .choosing import Choice, Tried
from .equal_size import at_equal_size
from .rejecting import best_until_then
from .statistics import Paired, Spread, Standing, commonest_hardware, standings

_SIZE_AT_THE_START = ("adalora", "elalora")
"""Methods that prune ranks, or move them between layers of other widths."""


@dataclass(frozen=True)
class Table:
    """Headers and lines; the first columns are words, the others numbers."""

    title: str
    headers: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    words: int = 1
    """How many columns at the start are words."""
    note: str = ""
    brief: tuple[int, ...] | None = None
    """The columns for a narrow place, such as a terminal; all of them if None."""


def tables(outcome: Outcome) -> list[Table]:
    """How the entrants stand, also beside those of their size, task by task, what the rates did,
    and what went wrong.
    """
    found = standings(outcome)
    equal, wrong = _at_equal_size(outcome), _wrong(outcome)
    return [
        _standing(outcome, found),
        *([equal] if equal.lines else []),
        _by_task(outcome, found),
        _rates(outcome),
        *([wrong] if wrong.lines else []),
    ]


def _standing(outcome: Outcome, found: Sequence[Standing]) -> Table:
    bake_off = outcome.prepared.bake_off
    size, seeds = outcome.prepared.sizes[bake_off.baseline], len(bake_off.settings.seeds)
    changing = {its.name for its in found if bake_off.method_of(its.name) in _SIZE_AT_THE_START}
    most = seeds * len(bake_off.settings.tasks)
    lines = []
    for its in found:
        against = its.against
        lines.append(
            (
                its.name + (" *" if its.on_front else ""),
                f"{its.size:,}" + (" †" if its.name in changing else ""),
                f"{its.size / size:.1%}",
                f"{its.rate:g}" if its.rate else "–",
                _spread(its.overall, seeds),
                "baseline" if its.name == bake_off.baseline else _difference(against),
                _pairs(against, most),
                f"{against.p:.3g}" if against else "–",
                f"{against.adjusted:.3g}" if against else "–",
                _seconds(its),
                f"{its.memory / 2**20:,.0f}" if its.memory else "–",
            )
        )
    headers = (
        "method", "trainable", f"of {bake_off.baseline}", "rate", "mean score", "difference",
        "pairs", "p", "p (Holm)", "seconds", "MiB",
    )  # fmt: skip
    notes = [
        "Trainable: numbers of the adapter, a classifier's head apart.",
        f"Mean score: over {_of(len(bake_off.settings.tasks), 'task')}, then over "
        f"{_of(seeds, 'seed')} (± their standard deviation).",
        *_of_several_metrics(outcome),
        f"Difference: from {bake_off.baseline} on the same task with the same seed, mean (lowest "
        f"to highest pair), above 0 where the method is better; pairs: of how many; p of a "
        f"two-sided sign-flip permutation test, and after Holm's correction.",
        f"Seconds: of training and the evaluations in it, {_where_timed(outcome)}.",
        "MiB: the most that a run took of the GPU; where there was none, of its whole process, "
        "which compares nothing.",
        "* Pareto-optimal: no smaller one is as good, and none of this size better.",
    ]
    if changing:
        notes.append(
            "† at the start: ranks are pruned or move, and what is kept may have another size."
        )
    if any(its.seconds is not None and not its.all_timed for its in found):
        notes.append("‡ of some runs only: others were resumed, or made on other hardware.")
    if any(its.missing for its in found):
        notes.append("Methods that lack runs come last, and have no part in *.")
    brief = (0, 1, 3, 4, 5, 8)
    return Table("How they stand", headers, tuple(lines), note=" ".join(notes), brief=brief)


def _at_equal_size(outcome: Outcome) -> Table:
    sizes, settings = outcome.prepared.sizes, outcome.prepared.bake_off.settings
    most = len(settings.seeds) * len(settings.tasks)
    lines = tuple(
        (
            its.name,
            its.other,
            f"{sizes[its.name] / sizes[its.other]:.1%}",
            _difference(its.paired),
            _pairs(its.paired, most),
            f"{its.paired.p:.3g}" if its.paired else "–",
            f"{its.paired.adjusted:.3g}" if its.paired else "–",
        )
        for its in at_equal_size(outcome)
    )
    headers = ("method", "beside", "of its size", "difference", "pairs", "p", "p (Holm)")
    note = (
        "Each method of a size that a budget asks for, beside one of that size: the baseline, else "
        "one of the baseline's kind; above 0 where the method is better. Where one of the two has "
        "no run on some task, there is nothing to compare. Holm's correction is for this table."
    )
    return Table("At equal size", headers, lines, words=2, note=note)


def _by_task(outcome: Outcome, found: Sequence[Standing]) -> Table:
    metrics, seeds = outcome.prepared.metrics, len(outcome.prepared.bake_off.settings.seeds)
    lines = tuple(
        (its.name, *(_spread(its.tasks.get(task), seeds) for task in metrics), _missing(its))
        for its in found
    )
    headers = ("method", *(f"{task} ({metric})" for task, metric in metrics.items()), "missing")
    note = "Best checkpoint of each run on the held-out rows, mean ± standard deviation of seeds."
    return Table("Task by task", headers, lines, note=note)


def _rates(outcome: Outcome) -> Table:
    lines = []
    for name, choice in outcome.choices.items():
        for tried in sorted([*choice.tried, *choice.begun], key=lambda its: its.rate):
            is_best = choice.best is not None and tried.rate == choice.best.rate
            cells = []
            for row in tried.rows:
                if row.status == "complete":
                    gave = f"{row.value:.4f}"
                elif row.status == "rejected":
                    metric = outcome.prepared.metrics[row.parameters["task"]]
                    gave = f"rejected (best until then {best_until_then(row, metric):.4f})"
                else:
                    gave = row.status
                cells.append(f"{row.parameters['task']} {gave}")
            said = _chosen(choice, tried) if is_best else "–"
            if tried in choice.begun:
                said = "not on all yet"
            lines.append((name, f"{tried.rate:g}", "; ".join(cells), said))
    note = "What each learning rate gave on what rates are chosen on."
    headers = ("method", "rate", "gave", "chosen")
    return Table("Learning rates", headers, tuple(lines), words=4, note=note)


def _chosen(choice: Choice, best: Tried) -> str:
    """That a rate was chosen, and what is not known of the rates around it."""
    if len(choice.tried) == 1:
        return "chosen, the only one"
    if best in (choice.tried[0], choice.tried[-1]):
        return "chosen, at an end of what was tried"
    # A machine's failure says nothing of a rate.
    place = choice.tried.index(best)
    beside = (choice.tried[place - 1], choice.tried[place + 1])
    failed = [its.rate for its in beside if any(row.status == "failed" for row in its.rows)]
    if failed:
        return f"chosen, though runs of {' and '.join(f'{rate:g}' for rate in failed)} failed"
    return "chosen"


def _wrong(outcome: Outcome) -> Table:
    lines = tuple(
        (row.name, row.status, row.error or "")
        for row in outcome.used
        if row.status in ("failed", "diverged")
    )
    return Table("What went wrong", ("run", "status", "why"), lines, words=3)


def _of_several_metrics(outcome: Outcome) -> list[str]:
    metrics = list(dict.fromkeys(outcome.prepared.metrics.values()))
    if len(metrics) < 2:
        return []
    named = f"{', '.join(metrics[:-1])} and {metrics[-1]}"
    return [
        f"Means, differences and p take {named} as if they were on one scale, which they are not: "
        f"a metric that moves more counts for more."
    ]


def _where_timed(outcome: Outcome) -> str:
    finals = outcome.finals.values()
    machines = {row.hardware for row in finals if row and row.status == "complete"}
    if len(machines) < 2:
        return "on the machine of the run"
    return f"of the runs on {commonest_hardware(outcome) or 'hardware that is not known'} alone"


def _seconds(standing: Standing) -> str:
    if standing.seconds is None:
        return "–"
    return f"{standing.seconds:,.0f}{'' if standing.all_timed else ' ‡'}"


def _spread(spread: Spread | None, seeds: int) -> str:
    if spread is None:
        return "–"
    found = len(spread.values)
    fewer = f" ({found} of {seeds} seeds)" if found < seeds else ""
    if spread.deviation is None:
        return f"{spread.mean:.4f}{fewer}"
    return f"{spread.mean:.4f} ± {spread.deviation:.4f}{fewer}"


def _difference(paired: Paired | None) -> str:
    if paired is None:
        return "–"
    low, high = min(paired.differences), max(paired.differences)
    said = f"{paired.mean:+.4f}"
    return f"{said} ({low:+.4f} to {high:+.4f})" if len(paired.differences) > 1 else said


def _pairs(paired: Paired | None, most: int) -> str:
    if paired is None:
        return "–"
    found = len(paired.differences)
    return f"{found}" if found == most else f"{found} of {most}"


def _missing(standing: Standing) -> str:
    return ", ".join(f"{count} {status}" for status, count in standing.missing.items()) or "–"


def _of(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count > 1)}"
