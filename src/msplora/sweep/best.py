"""Which settings of a sweep are the best, of those that were scored on the same rows and tokens."""

from __future__ import annotations

from msplora.train.scored_on import ScoredOn, difference

from .settings_tried import Setting, rank


def scored_alike(settings: list[Setting]) -> list[list[Setting]]:
    """The settings with every seed complete: those together that were scored on the same."""
    found: dict[tuple[ScoredOn, ...], list[Setting]] = {}
    whole = [its for its in settings if its.is_whole]
    for setting, scored_on in zip(whole, _scored_on(whole), strict=True):
        found.setdefault(scored_on, []).append(setting)
    return list(found.values())


def not_comparable(settings: list[Setting]) -> str | None:
    """Why no best of all settings can be told, as a sentence; None where it can."""
    firsts = [its[0] for its in scored_alike(settings)]
    for of_a_seed in zip(*_scored_on(firsts), strict=True):
        found = difference(of_a_seed)
        if found:
            return f"scored on {found}: not comparable"
    return None


def _scored_on(settings: list[Setting]) -> list[tuple[ScoredOn, ...]]:
    """By seed. Of runs of an older msplora the tokens of a language model are all that is known."""
    rows = [setting.complete for setting in settings]
    if all(row.scored_on for its in rows for row in its):
        return [tuple(ScoredOn(**row.scored_on or {}) for row in its) for its in rows]
    return [tuple(ScoredOn(None, None, row.best.get("tokens")) for row in its) for its in rows]


def best_by_method(settings: list[Setting]) -> list[Setting]:
    """The best setting of each method, or of all where the method is not swept; where not all were
    scored on the same, the best ones of those that were.
    """
    return [its for alike in scored_alike(settings) for its in _best_by_method(alike)]


def marked(settings: list[Setting]) -> list[tuple[Setting, str]]:
    """The best settings, and what they are best of; not one that is compared with no other."""
    groups, found = scored_alike(settings), []
    for alike in groups:
        if len(groups) > 1 and len(alike) == 1:
            continue
        of = " of those scored alike" if len(groups) > 1 else ""
        best = min(alike, key=rank)
        for its in _best_by_method(alike):
            what = "best" if its is best else f"best {its.method}"
            found.append((its, what + of))
    return found


def _best_by_method(alike: list[Setting]) -> list[Setting]:
    methods = dict.fromkeys(its.method for its in alike)
    return [min((its for its in alike if its.method == one), key=rank) for one in methods]
