"""Preference pairs to token ids: the prompt once, then what each answer adds to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .bad_rows import BadRows
from .data_files import DataError
from .data_preference import Pair
from .lengths import LengthReport, Limit, keep, refuse_if_none_left
from .tokenise_sft import IGNORED, Tokens, whole_row


@dataclass(frozen=True)
class PairTokens:
    """Token ids of a pair, under the names that TRL gives its columns."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def tokenise_pairs(
    pairs: list[Pair], tokenizer: Any, limit: Limit, what: str, bad: BadRows | None = None
) -> tuple[list[PairTokens], LengthReport]:
    """Return the pairs to learn from, and what became of those that were too long.

    A pair is as long as its longer half. Both halves are cut at the end, so that a pair whose
    prompt fills the length, or whose halves are alike within it, is left out. `bad` takes those
    that the chat template refuses.
    """
    bad, report = bad or BadRows(), LengthReport()
    rows = []
    for pair in pairs:
        whole = None
        with bad.at(pair.place):
            whole = _pair(pair, tokenizer)
        if whole is None:
            continue
        prompt, halves = whole.prompt_ids, (whole.chosen_ids, whole.rejected_ids)
        length = len(prompt) + max(map(len, halves))
        if not keep(length, pair.place, limit, report):
            continue
        room = None if limit.length is None else max(limit.length - len(prompt), 0)
        chosen, rejected = (half[:room] for half in halves)
        if chosen and rejected and chosen != rejected:
            rows.append(PairTokens(prompt, chosen, rejected))
        else:
            report.truncated -= room is not None and max(map(len, halves)) > room
            report.unlearnt += 1
    if not report.rows:
        bad.refuse_if_none_left(rows, f"{what} row")
    refuse_if_none_left(rows, limit, what)
    return rows, report


def _pair(pair: Pair, tokenizer: Any) -> PairTokens:
    """The tokens of supervised fine-tuning on each answer, cut where they stop being the prompt's.

    A token that holds the end of the prompt and the start of one answer belongs to both answers.
    """
    chosen, rejected = (whole_row(its, tokenizer) for its in (pair.chosen, pair.rejected))
    for its in (chosen, rejected):
        if its.labels[-1] == IGNORED:
            raise DataError(
                f"{pair.place}: where the answer begins cannot be found: the chat template renders "
                f"the turns before it in another way without it. Name another data.chat_template."
            )
    prompt = min(_answer_from(chosen), _answer_from(rejected))
    for place, (one, other) in enumerate(zip(chosen.input_ids, rejected.input_ids, strict=False)):
        if one != other:
            prompt = min(prompt, place)
            break
    if prompt == 0:
        raise DataError(f"{pair.place}: the prompt has no token that both answers follow.")
    return PairTokens(
        chosen.input_ids[:prompt], chosen.input_ids[prompt:], rejected.input_ids[prompt:]
    )


def _answer_from(row: Tokens) -> int:
    """Where the last stretch that is learnt begins: earlier turns of the assistant are prompt."""
    place = len(row.labels)
    while place and row.labels[place - 1] == IGNORED:
        place -= 1
    while place and row.labels[place - 1] != IGNORED:
        place -= 1
    return place
