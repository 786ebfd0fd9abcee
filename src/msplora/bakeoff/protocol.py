"""What was done, in sentences, and with what: no figure is to be read without them."""

from __future__ import annotations

from .bake_off import Outcome
from .described import described
from .reading import BakeOff, Run
from .statistics import least_p, standings
from .verdicts import verdicts


def protocol(outcome: Outcome) -> list[str]:
    """The protocol, a sentence each."""
    prepared, bake_off = outcome.prepared, outcome.prepared.bake_off
    settings = bake_off.settings
    tasks = [f"{task} ({metric})" for task, metric in prepared.metrics.items()]
    said = [
        f"{len(bake_off.entrants)} methods on {', '.join(tasks)}. All settings that are not "
        f"named in a method are the same for all.",
        *described(bake_off),
        _how_rates_are_chosen(bake_off),
        f"Then each method runs on every task with the seeds {_list(settings.seeds)} at its rate; "
        f"a run that was made while choosing, with one of these seeds, is not made twice."
        f"{_scored_again(bake_off)}",
        f"The value of a run is that of its best checkpoint on the held-out rows, which also "
        f"choose the rate: there is no third set, so all values are somewhat too good, a little "
        f"more so of a method that tried more rates. Tried: "
        f"{', '.join(f'{len(its.tried)} by {name}' for name, its in outcome.choices.items())}.",
    ]
    if still := _still_improving(outcome):
        said.append(still)
    if settings.reject:
        said.append(
            f"While rates are chosen a run is given up, after {settings.reject.after:.0%} of it, "
            f"where its best value so far is worse by more than {settings.reject.behind:g} than "
            f"what another rate of the same method, tried before it, had reached on the task with "
            f"the same seed by then. A rate of which a run was given up is not chosen."
            f"{_spared(outcome)}"
        )
    budgets = [its for its in bake_off.entrants.values() if its.budget is not None]
    said += [
        f"{its.name} has the smallest rank that does not train fewer numbers than "
        + (its.budget if isinstance(its.budget, str) else f"{its.budget:,}")
        + (f": {prepared.ranks[its.name]}." if its.name in prepared.ranks else ".")
        for its in budgets
        if its.budget is not None
    ]
    drawn = _drawn_by_the_seed(bake_off)
    said.append(
        f"The p-values take the tasks{'' if drawn else ' and their held-out rows'} as given: they "
        f"say whether a difference is more than the luck of the seeds, not whether it would be "
        f"found on other tasks."
        + (
            f" Of {', '.join(drawn)} a seed also draws which rows are held out: the ± and the "
            f"p-values are of other splits too."
            if drawn
            else ""
        )
        + _least_p(outcome)
        + (
            " They take the runs of a seed on several tasks for independent. These start from the "
            "same random numbers: as far as that makes them alike, p is too small."
            if len(prepared.metrics) > 1
            else ""
        )
    )
    return said


def _how_rates_are_chosen(bake_off: BakeOff) -> str:
    settings = bake_off.settings
    same = {its.rates for its in bake_off.entrants.values()}
    if all(len(its) == 1 for its in same):
        return "The learning rate of each method is the one that was given for it."
    rates = ", ".join(f"{rate:g}" for rate in settings.learning_rates)
    return (
        f"The learning rate of each method is the one with the best mean over "
        f"{', '.join(bake_off.choose_tasks)} with seed {_list(bake_off.choose_seeds)}, of "
        f"{rates}{' (some methods have rates of their own)' if len(same) > 1 else ''}"
        f"{_extended(settings.choose.extend, max(map(len, same)))}. It is the same for all tasks."
    )


def _scored_again(bake_off: BakeOff) -> str:
    """Of how many pairs a run is that has won already."""
    settings = bake_off.settings
    twice = len(bake_off.choose_tasks) * len({*bake_off.choose_seeds} & {*settings.seeds})
    several = any(len(its.rates) > 1 for its in bake_off.entrants.values())
    if not twice or not several:
        return ""
    return (
        f" {twice} of the {len(settings.tasks) * len(settings.seeds)} pairs of each method "
        f"{'is' if twice == 1 else 'are'} of the runs that chose its rate: what luck did for them "
        f"there counts here again."
    )


def _still_improving(outcome: Outcome) -> str:
    """Of how many runs that count the last evaluation was the best of several."""
    rows = [row for row in outcome.finals.values() if row and row.status == "complete"]
    several = [row for row in rows if len(row.evaluations) > 1 and row.best]
    still = sum(row.best["step"] == row.evaluations[-1]["step"] for row in several)
    if not still:
        return ""
    return (
        f"{still} of the {len(several)} runs that count were at their best at their last "
        f"evaluation, so they may still have been improving: with more training methods may "
        f"stand in another order."
    )


def _spared(outcome: Outcome) -> str:
    """How many complete runs the present rule would have given up."""
    found = verdicts(outcome.prepared, outcome.choices)
    count = sum(row.status == "complete" and hopeless for row, hopeless in found)
    if not count:
        return ""
    return (
        f" {count} of the complete runs would have been given up so and count all the same: they "
        f"were made under another rule, or to their end since no rate of their method had come "
        f"to it."
    )


def _drawn_by_the_seed(bake_off: BakeOff) -> list[str]:
    """The tasks whose held-out rows are a share of the training rows, drawn by each run's seed."""
    found = []
    for task in bake_off.settings.tasks:
        data = bake_off.settings_of(Run(bake_off.baseline, task, 1.0, 0)).data
        if not (data.glue or data.validation or data.validation_split):
            found.append(task)
    return found


def _extended(times: int, rates: int) -> str:
    if times == 0 or rates < 2:  # the step to the next one is that between the rates
        return ""
    often = f", at most {times} times" if times > 1 else ""
    return f"; where that is the lowest or the highest, the next one beyond it is tried too{often}"


def _least_p(outcome: Outcome) -> str:
    pairs = [len(its.against.differences) for its in standings(outcome) if its.against]
    if not pairs:
        return ""
    least, methods = least_p(max(pairs)), len(outcome.prepared.bake_off.entrants) - 1
    return (
        f" With {max(pairs)} pairs none can be below {least:.2g}, which Holm's correction makes "
        f"{min(1.0, methods * least):.2g} for the first of {methods} methods."
    )


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
