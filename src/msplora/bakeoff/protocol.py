"""What was done, in sentences, and with what: no figure is to be read without them."""

from __future__ import annotations

from .bake_off import Outcome


def protocol(outcome: Outcome) -> list[str]:
    """The protocol, a sentence each."""
    prepared, bake_off = outcome.prepared, outcome.prepared.bake_off
    settings = bake_off.settings
    tasks = [f"{task} ({metric})" for task, metric in prepared.metrics.items()]
    same = {its.rates for its in bake_off.entrants.values()}
    rates = ", ".join(f"{rate:g}" for rate in settings.learning_rates)
    said = [
        f"{len(bake_off.entrants)} methods on {', '.join(tasks)}. All settings that are not "
        f"named in a method are the same for all.",
        f"The learning rate of each method is the one with the best mean over "
        f"{', '.join(bake_off.choose_tasks)} with seed {_list(bake_off.choose_seeds)}, of "
        f"{rates}{' (some methods have rates of their own)' if len(same) > 1 else ''}; where that "
        f"is the lowest or the highest, the next one beyond it is tried too, at most "
        f"{settings.choose.extend} times. It is the same for all tasks.",
        f"Then each method runs on every task with the seeds {_list(settings.seeds)} at its rate. "
        f"Runs made while choosing count among these.",
        "The value of a run is that of its best checkpoint on the held-out rows, which also choose "
        "the rate: there is no third set, so all values are somewhat too good, for every method "
        "alike.",
    ]
    if settings.reject:
        said.append(
            f"While rates are chosen a run is given up, after {settings.reject.after:.0%} of it, "
            f"where its best value so far is worse by more than {settings.reject.behind:g} than "
            f"what another rate of the same method had reached on the task by then."
        )
    budgets = [its for its in bake_off.entrants.values() if its.budget is not None]
    said += [
        f"{its.name} has the smallest rank that does not train fewer numbers than "
        + (its.budget if isinstance(its.budget, str) else f"{its.budget:,}")
        + "."
        for its in budgets
        if its.budget is not None
    ]
    said.append(
        "The p-values take the tasks and their held-out rows as given: they say whether a "
        "difference is more than the luck of the seeds, not whether it would be found on other "
        "tasks."
    )
    return said


def origins(outcome: Outcome) -> list[str]:
    """Versions, commits and machines of all runs, a line each."""
    rows = [row for row in outcome.rows if row.status in ("complete", "rejected", "diverged")]
    lines = []
    for what, values in (
        ("commit", [row.commit or "unknown" for row in rows]),
        ("hardware", [row.hardware or "unknown" for row in rows]),
        (
            "versions",
            [
                ", ".join(f"{name} {its}" for name, its in row.versions.items())
                for row in rows
                if row.versions
            ],
        ),
    ):
        for value in dict.fromkeys(values):
            lines.append(f"{what}: {value} ({values.count(value)} runs)")
    hours = sum(row.seconds for row in rows) / 3600
    counts = {status: sum(row.status == status for row in outcome.rows) for status in _STATUSES}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return [*lines, f"runs: {told or 'none'}; {hours:.1f} hours of runs in all"]


_STATUSES = ("complete", "rejected", "diverged", "failed", "unfinished")


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
