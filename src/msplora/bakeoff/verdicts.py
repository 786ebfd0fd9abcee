"""What the present rule says of the runs that rates were chosen by, whatever was done with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msplora.sweep.rows import Row

from .choosing import Choice
from .rejecting import Rejecting
from .sizes import Prepared


def verdicts(prepared: Prepared, choices: Mapping[str, Choice]) -> Iterator[tuple[Row, bool]]:
    """Each run of a rate that was tried, and whether the rule of the file gives it up."""
    reject = prepared.bake_off.settings.reject
    for name, choice in choices.items():
        rows = {its.rate: its.rows for its in choice.tried}
        before: dict[tuple[str, int | None], list[Row]] = {}
        for rate in (*prepared.bake_off.entrants[name].rates, *choice.reached):
            for row in rows.get(rate, ()):
                task = row.parameters["task"]
                rivals = before.setdefault((task, row.seed), [])
                hopeless = False
                if reject:
                    evaluations = [its.evaluations for its in rivals]
                    rule = Rejecting(reject, prepared.metrics[task], evaluations)
                    # Older rows do not say how many steps the run was to have.
                    steps = row.steps or max((its["step"] for its in row.evaluations), default=0)
                    hopeless = bool(rule.until_hopeless(row.evaluations, steps))
                yield row, hopeless
                if row.status in ("complete", "rejected"):
                    rivals.append(row)
