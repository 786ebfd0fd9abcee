"""Where the figures are from: commits, machines and versions, and whether pairs share them."""

from __future__ import annotations

from typing import Any

from msplora.sweep.rows import Row

from .bake_off import Outcome
from .folder import HAVE_RESULTS

_STATUSES = ("complete", "rejected", "diverged", "failed", "unfinished")


def origins(outcome: Outcome) -> list[str]:
    """Versions, commits and machines of the runs in use, a line each."""
    used = outcome.used
    rows = [row for row in used if row.status in HAVE_RESULTS]
    lines = []
    for what, values in (
        ("commit", [row.commit or "unknown" for row in rows]),
        ("hardware", [row.hardware or "unknown" for row in rows]),
        ("versions", [_versions(row.versions) for row in rows if row.versions]),
    ):
        for value in dict.fromkeys(values):
            lines.append(f"{what}: {value} ({values.count(value)} runs)")
    lines += _went_on(rows)
    alike, pairs = pairs_alike(outcome)
    if pairs:
        lines.append(
            f"pairs: {alike} of {pairs} with {outcome.prepared.bake_off.baseline} are of one "
            f"commit, hardware and versions on both sides"
            + ("" if alike == pairs else "; in the others they differ, or are not known")
        )
    unknown = sum(row.files is None for row in rows)
    if unknown:
        lines.append(
            f"data: what {unknown} of the runs read was not recorded (an earlier version made "
            f"them, or their rows were lost): only the names of the files were compared"
        )
    counts = {status: sum(row.status == status for row in used) for status in _STATUSES}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    hours = sum(row.seconds for row in rows) / 3600
    lines.append(f"runs: {told or 'none'}; {hours:.1f} hours of runs in all")
    names = {row.name for row in used}
    others = [row.name for row in outcome.rows if row.name not in names]
    if others:
        lines.append(
            f"not counted: {len(others)} rows of no method, task, rate or seed that this file asks "
            f"for, or of a rate that is no longer the chosen one, such as {others[0]}"
        )
    return lines


def pairs_alike(outcome: Outcome) -> tuple[int, int]:
    """Of how many pairs with the baseline both runs were made on the same, and how many there are.

    What has no commit, or changes beside it, is not known to be the same as anything.
    """
    complete = {run: row for run, row in outcome.finals.items() if row and row.status == "complete"}
    baseline = outcome.prepared.bake_off.baseline
    other = {(run.task, run.seed): row for run, row in complete.items() if run.entrant == baseline}
    pairs = [
        (row, other[run.task, run.seed])
        for run, row in complete.items()
        if run.entrant != baseline and (run.task, run.seed) in other
    ]
    alike = sum(_made_on(one) is not None and _made_on(one) == _made_on(two) for one, two in pairs)
    return alike, len(pairs)


def _made_on(row: Row) -> Any:
    """What a run was made on from its beginning to its end; None where that is no one thing."""
    is_known = row.commit and row.hardware and row.commit != "unknown"
    if row.earlier or not is_known or (row.commit or "").endswith("-dirty"):
        return None
    return row.commit, row.hardware, row.versions


def _went_on(rows: list[Row]) -> list[str]:
    """Of the runs that began on something else than they ended on, or on what is not known."""
    found, unknown = [], 0
    for row in rows:
        is_known = all(its["commit"] or its["hardware"] for its in row.earlier)
        unknown += not is_known
        if row.earlier and is_known:
            found.append(row)
    lines = []
    if found:
        before = dict.fromkeys(
            f"{its['commit'] or 'an unknown commit'} ({its['hardware'] or 'unknown hardware'})"
            for row in found
            for its in row.earlier
        )
        lines.append(
            f"resumed: {len(found)} of the runs ended on another commit, hardware or versions than "
            f"they began on: {', '.join(before)}"
        )
    if unknown:
        lines.append(
            f"resumed: on what {unknown} of the runs began was not recorded, as where the start "
            f"that began them on Ray was stopped"
        )
    return lines


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {its}" for name, its in versions.items())
