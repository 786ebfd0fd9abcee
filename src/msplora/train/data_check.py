"""What a run's rows are like, and what of it is usually a mistake, before training."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .lengths import LengthReport

NOTEWORTHY = 0.01
"""Share of the rows from which what is lost of them is worth a warning."""

FEW = 10
"""Fewer training rows of a class than this are worth a warning."""


@dataclass(frozen=True)
class Said:
    """What a row says, as far as it matters whether another says the same."""

    place: str
    text: str
    label: str = ""

    @property
    def key(self) -> bytes:
        """Equal for texts that differ in nothing but case and white space."""
        plain = " ".join(self.text.casefold().split())
        return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True)
class Repeats:
    """How many rows say what another row says, and one of them."""

    rows: int = 0
    example: dict[str, str] | None = None


@dataclass(frozen=True)
class SplitCheck:
    """The rows of one split: training rows as often as an epoch sees them."""

    rows: int
    """As read."""
    kept: int
    """What is left of them to train on, or to judge by."""
    truncated: int
    dropped: int
    unlearnt: int
    tokens: int
    trained_tokens: int | None
    """Those that the loss counts; None for a classifier."""
    longest: int
    """Tokens of the longest row before any was cut."""
    median: int
    without_end: int | None = None
    """Kept rows whose last trained token is not the end token; None where none should be."""
    classes: dict[str, int] | None = None
    turns: int = 0
    """Of the assistant, in the chats that are kept."""
    unlearnt_turns: int = 0
    """Those that are not learnt, since the template renders them in another way by themselves."""
    shortened_turns: int = 0
    """Those that are learnt without words of theirs, such as thoughts: the template has none."""

    @classmethod
    def of(
        cls,
        report: LengthReport,
        lengths: Sequence[int],
        trained: int | None = None,
        without_end: int | None = None,
        classes: dict[str, int] | None = None,
    ) -> SplitCheck:
        """Count rows of the lengths given, which are those that were kept."""
        return cls(
            report.rows,
            len(lengths),
            report.truncated,
            report.dropped,
            report.unlearnt,
            sum(lengths),
            trained,
            report.longest,
            int(statistics.median(lengths)),
            without_end,
            classes,
            report.turns,
            report.unlearnt_turns,
            report.shortened_turns,
        )

    def note(self, name: str, report: LengthReport) -> str:
        """One line on the split."""
        learnt = f", {self.trained_tokens:,} of them learnt" if self.trained_tokens else ""
        return f"{name}: {report}; {self.tokens:,} tokens{learnt}, {self.median} in the median row"


@dataclass
class DataCheck:
    """The content of data.json."""

    sources: list[dict[str, Any]]
    training: SplitCheck
    held_out: SplitCheck | None
    repeated_in_training: Repeats
    """Training rows that say what an earlier one says."""
    held_out_in_training: Repeats
    """Held-out rows that a training row says too."""
    empty: dict[str, int] = field(default_factory=dict)
    """Rows with nothing where a text should be, by what is missing."""
    bad_rows: dict[str, Any] = field(default_factory=dict)
    """Rows left out since they cannot be used: how many, and the first with its reason."""
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The check as JSON holds it."""
        return asdict(self)


def repeats_within(rows: Iterable[Said]) -> Repeats:
    """Find rows that say what an earlier row says; a row that stands twice by its weight is one."""
    first: dict[bytes, Said] = {}
    found = []
    for row in _once(rows):
        earlier = first.setdefault(row.key, row)
        if earlier is not row:
            found.append((row, earlier))
    return _repeats(found)


def repeats_between(held_out: Iterable[Said], training: Iterable[Said]) -> Repeats:
    """Find held-out rows that say what a training row says."""
    first: dict[bytes, Said] = {}
    for row in training:
        first.setdefault(row.key, row)
    return _repeats([(row, first[row.key]) for row in _once(held_out) if row.key in first])


def contradictions(rows: Iterable[Said]) -> Repeats:
    """Find rows that say what an earlier row says, under another label."""
    first: dict[bytes, Said] = {}
    found = []
    for row in _once(rows):
        earlier = first.setdefault(row.key, row)
        if earlier.label != row.label:
            found.append((row, earlier))
    return _repeats(found)


def share(count: int, rows: int) -> str:
    """Write a count as part of a whole: `12 of 300 (4.0 %)`."""
    return f"{count:,} of {rows:,} ({100 * count / rows:.1f} %)"


def warnings_on_lengths(split: SplitCheck, name: str, max_length: int | None) -> list[str]:
    """What is usually a mistake in how long the rows may be."""
    found = []
    if split.truncated > NOTEWORTHY * split.rows:
        found.append(
            f"{share(split.truncated, split.rows)} {name} rows are truncated to data.max_length = "
            f"{max_length} and lose their end; the longest has {split.longest:,} tokens. Raise it, "
            f"or set data.too_long to drop."
        )
    if split.dropped > 10 * NOTEWORTHY * split.rows:
        found.append(
            f"{share(split.dropped, split.rows)} {name} rows are dropped as longer than "
            f"data.max_length = {max_length}; the longest has {split.longest:,} tokens. Raise it."
        )
    if split.unlearnt > NOTEWORTHY * split.rows:
        found.append(
            f"{share(split.unlearnt, split.rows)} {name} rows are left out without a token to "
            f"learn: their prompt fills data.max_length = {max_length}. Raise it."
        )
    return found


def warnings_on_repeats(check: DataCheck) -> list[str]:
    """What is usually a mistake in rows that stand twice."""
    found = []
    again, leaked = check.repeated_in_training, check.held_out_in_training
    if again.rows > NOTEWORTHY * check.training.rows:
        found.append(
            f"{share(again.rows, check.training.rows)} training rows say what an earlier one says, "
            f"as {_as_in(again)}. Remove them; to see rows more often, give their source a weight."
        )
    if leaked.rows and check.held_out:
        found.append(
            f"{share(leaked.rows, check.held_out.rows)} held-out rows also stand among the "
            f"training rows, as {_as_in(leaked)}, so the run will be judged too well. Remove them "
            f"from one of the two."
        )
    return found


def _as_in(repeats: Repeats) -> str:
    assert repeats.example
    return f"{repeats.example['row']} does what is in {repeats.example['same_as']}"


def _once(rows: Iterable[Said]) -> Iterable[Said]:
    return {row.place: row for row in rows}.values()


def _repeats(found: list[tuple[Said, Said]]) -> Repeats:
    if not found:
        return Repeats()
    row, other = found[0]
    shown = " ".join(row.text.split())
    shown = shown if len(shown) <= 100 else f"{shown[:99]}…"
    return Repeats(len(found), {"row": row.place, "same_as": other.place, "text": shown})
