"""Sentences of the page that claim something, computed from the rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from .measured import AGAIN, LORA, OURS, Measured, labels, method_name
from .methods import METHODS as DEFINITIONS
from .tables import (
    Verdict,
    escape,
    exact,
    overhead_share,
    percent,
    quartiles,
    ratio_to_lora,
    rounded,
    spread,
    unjudged,
    verdict,
)

Judged = tuple[Verdict, str, str]  # and the point's name, and why it was not judged


def judged(points: Sequence[Measured], among: Sequence[Measured] | None = None) -> list[Judged]:
    """Judge these points, named as they are told apart `among` others."""
    names = dict(zip(map(id, among or points), labels(among or points), strict=True))
    return [(verdict(point), escape(names[id(point)]), unjudged(point)) for point in points]


def speed_claim(found: Sequence[Judged]) -> str:
    """Say at how many points ours is not slower than LoRA, naming all others, and faster."""
    where = {kind: [name for its, name, _ in found if its is kind] for kind in Verdict}
    total = len(found) - len(where[Verdict.UNJUDGED])
    sentences = []
    if total:
        level = total - len(where[Verdict.SLOWER])
        sentences.append(
            f"At {level} of {_points(total)}, MSPLoRA is not slower than LoRA beyond the A/A spread"
            + _listed("; it is at", where[Verdict.SLOWER])
        )
    else:
        sentences.append("No point here can be judged.")
    if where[Verdict.FASTER]:
        faster = _points(len(where[Verdict.FASTER]))
        sentences.append(f"Beyond that spread it is faster at {faster}.")
    reasons = [f"{name} ({escape(why)})" for kind, name, why in found if kind is Verdict.UNJUDGED]
    if reasons:
        sentences.append(_listed("Not judged", reasons))
    return " ".join(sentences)


def inside_claim(points: Iterable[Measured]) -> str:
    """Say on which side of LoRA's the medians lie that the control's spread does not tell apart."""
    inside = [
        exact(point.rows[OURS]["to_lora"][1]) for point in points if verdict(point) is Verdict.LEVEL
    ]
    above = [median for median in inside if median > 1]
    if not above:
        return ""
    return (
        f"Inside the spread its median is above LoRA's at {len(above)} of {_points(len(inside))}, "
        f"by at most {rounded((max(above) - 1) * 100, 1, OURS)}%."
    )


def control_range(points: Iterable[Measured]) -> str:
    """Say how far apart the same method's two runs lay; empty without a control."""
    found = [
        value
        for point in points
        if AGAIN in point.rows and (value := quartiles(point.rows[AGAIN]["to_lora"])) is not None
    ]
    if not found:
        return ""
    lower, medians, upper = ([value[place] for value in found] for place in range(3))
    middle = _between(*map(_control, _ends(medians)))
    return (
        f"The A/A control's median is {middle} over these points, and its quartiles reach from "
        f"{_control(min(lower))} to {_control(max(upper))}."
    )


def share_claim(points: Sequence[Measured]) -> str:
    """Say what ours adds to the floor, as a share of what LoRA adds, where it can be judged."""
    may_be = [point for point in points if not unjudged(point)]
    shares = [share for point in may_be if (share := overhead_share(point)) is not None]
    if not shares:
        return ""
    where = ""
    if len(shares) < len(may_be):
        where = (
            f", at the {_points(len(shares))} of {len(may_be)} where LoRA adds more to the floor "
            f"than it is from itself"
        )
    again = [found for point in may_be if (found := overhead_share(point, AGAIN)) is not None]
    control = _between(*(percent(share, AGAIN) for share in _ends(again)))
    return (
        f"MSPLoRA's overhead over the floor is {_range(shares, 100, 1, '%')} of LoRA's{where}; "
        f"that of LoRA measured again, {control}."
    )


def main_claim(point: Measured) -> str:
    """Say what ours costs at one point."""
    if not point.has(OURS, LORA) or quartiles(point.rows[OURS]["to_lora"]) is None:
        return "MSPLoRA and LoRA were not both measured here."
    step = f"A step with MSPLoRA takes {spread(point.rows[OURS]['to_lora'], 3, OURS)} of LoRA's"
    share = overhead_share(point)
    if share is not None:
        step += f"; its overhead over the floor is {percent(share, OURS)} of LoRA's"
        again = overhead_share(point, AGAIN)
        if again is not None:
            step += f" (that of LoRA measured again, {percent(again, AGAIN)})"
    why = unjudged(point)
    if why:
        return f"{step}. No claim is made of it: {escape(why)}."
    words = {
        Verdict.SLOWER: "it is slower beyond the A/A spread",
        Verdict.FASTER: "it is faster beyond the A/A spread",
        Verdict.LEVEL: "the difference is inside the A/A spread",
    }
    control = spread(point.rows[AGAIN]["to_lora"], 3, AGAIN)
    return f"{step}. LoRA measured against itself: {control}, so {words[verdict(point)]}."


def what_they_are(methods: Iterable[str]) -> str:
    """Say of each method what it trains, as the benchmark defines it."""
    told = [
        f"{escape(method_name(name))}: {escape(DEFINITIONS[name].about)}"
        for name in methods
        if name in DEFINITIONS
    ]
    return f"The methods are {'; '.join(told)}." if told else ""


def less_claim(points: Sequence[Measured], field: str, what: str, more: str = "more") -> str:
    """Say at how many points ours takes no more of something than LoRA, and name the others."""
    both = [(p, ratio) for p in points if (ratio := ratio_to_lora(p, OURS, field)) is not None]
    if not both:
        return ""
    names = dict(zip(map(id, points), labels(points), strict=True))
    above = [
        f"{escape(names[id(point)])} ({rounded(ratio, 3, OURS)} of LoRA's)"
        for point, ratio in both
        if ratio > 1
    ]
    ratios = [ratio for _, ratio in both]
    return (
        f"At {len(both) - len(above)} of {_points(len(both))}, {what} no {more} than LoRA's"
        + _listed(f"; {more} at", above)
        + f" Its share of LoRA's: {_range(ratios, 1, 3, '')}."
    )


def time_claim(points: Sequence[Measured], field: str, what: str) -> str:
    """Say what share of LoRA's time something takes, beside the control's."""
    ours, again = (
        [exact(found[1]) for p in points if (found := quartiles(p.rows.get(name, {}).get(field)))]
        for name in (OURS, AGAIN)
    )
    if not ours:
        return ""
    control = _between(*map(_control, _ends(again))) if again else ""
    return (
        f"{what} takes {_range(ours, 1, 3, '')} of LoRA's time"
        + (f"; LoRA measured against itself, {control}" if control else "")
        + "."
    )


def singular_value_claim(points: Sequence[Measured]) -> str:
    """Say how much faster the factors' singular values are found, and how equal they are."""
    rows = [p.rows["factors"] for p in points if "factors" in p.rows]
    faster = [q[1] for row in rows if (q := quartiles(row["times_faster"])) is not None]
    off = [q[1] for row in rows if (q := quartiles(row["max_relative_difference"])) is not None]
    sentences = []
    if faster:
        found = _between(*(rounded(n, 1, OURS, large_is_good=True) for n in _ends(faster)))
        sentences.append(f"Taken from the factors they are found {found} times as fast.")
    if off:
        sentences.append(f"The largest relative difference is {difference(max(off))}.")
    return " ".join(sentences)


def difference(value: Any) -> str:
    """Write a tiny relative difference, rounded up."""
    found = quartiles(value)
    if found is None:
        return "–"
    if not found[1]:
        return "0"
    number = exact(found[1])
    places = number.adjusted()
    digits = rounded(number.scaleb(-places), 1, OURS)
    return f"{digits}e{places:+03d}" if digits != "10.0" else f"1.0e{places + 1:+03d}"


def _range(values: Sequence[Decimal], per: int, digits: int, unit: str) -> str:
    return _between(*(rounded(value * per, digits, OURS) + unit for value in _ends(values)))


def _ends(values: Sequence[Any]) -> tuple[Any, Any]:
    return min(values), max(values)


def _between(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _control(value: float | Decimal) -> str:
    return rounded(value, 3, AGAIN)


def _points(number: int) -> str:
    return f"{number} point{'s' * (number != 1)}"


def _listed(start: str, names: Sequence[str]) -> str:
    return f"{start}: {'; '.join(names)}." if names else "."
