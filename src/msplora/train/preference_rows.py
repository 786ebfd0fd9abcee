"""Preference pairs made ready and looked over; no weight of a model is needed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from rich.text import Text

from .data_check import (
    DataCheck,
    Said,
    SplitCheck,
    contradictions,
    repeats_between,
    repeats_within,
    share,
    warnings_on_lengths,
    warnings_on_repeats,
)
from .data_preference import Pair, PreferenceData
from .end_tokens import warnings_on_ends, without_end
from .lengths import LengthReport, Limit
from .tokenise_preference import PairTokens, tokenise_pairs
from .tokenise_sft import Tokens

LOPSIDED = 0.7
"""Share of pairs whose preferred answer is the longer one, from which that is worth a warning."""


@dataclass(frozen=True)
class PreferenceRows:
    """Training and held-out pairs as token ids, and what there is to say of them."""

    train: list[PairTokens]
    held_out: list[PairTokens]
    notes: list[str]
    check: DataCheck


def prepare_rows(
    data: PreferenceData, tokenizer: Any, limit: Limit, ends: Collection[int]
) -> PreferenceRows:
    """Tokenise a run's pairs and check them; `ends` are the ids at which the model stops."""
    notes = _source_notes(data)
    pairs: dict[str, list[PairTokens]] = {"training": [], "held-out": []}
    checks: dict[str, SplitCheck] = {}
    for what, its in (("training", data.train), ("held-out", data.held_out)):
        if its:
            pairs[what], report = tokenise_pairs(its, tokenizer, limit, what, data.bad)
            checks[what] = _split(pairs[what], report, ends, tokenizer)
            notes.append(checks[what].note(what, report))
    longer = sum(len(its.chosen_ids) > len(its.rejected_ids) for its in pairs["training"])
    notes.append(f"the chosen answer is the longer: {share(longer, len(pairs['training']))}")
    if data.alike:
        notes.append(f"left out: {data.alike} rows whose two answers are the same")
    if data.empty:
        notes.append(f"left out: {data.empty} rows with an empty answer")
    notes += data.bad.notes()
    said, held_said = (
        [_said(pair) for pair in of_split if pair.place not in data.bad]
        for of_split in (data.train, data.held_out)
    )
    check = DataCheck(
        [asdict(source) for source in data.sources],
        checks["training"],
        checks.get("held-out"),
        repeats_within(said),
        repeats_between(held_said, said),
        {"an empty answer": data.empty} if data.empty else {},
        data.bad.to_dict(),
    )
    for what, split in checks.items():
        check.warnings += warnings_on_lengths(split, what, limit.length)
    chats = "messages" in data.forms
    check.warnings += warnings_on_ends(check.training, chats, ends, tokenizer)
    check.warnings += warnings_on_repeats(check)
    check.warnings += _warnings_on_pairs(said, longer, check.training)
    return PreferenceRows(pairs["training"], pairs["held-out"], notes, check)


def _source_notes(data: PreferenceData) -> list[str]:
    training = [source for source in data.sources if source.train]
    if len(training) == 1 and training[0].weight == 1:
        return [f"form of the prompts: {training[0].form}"]
    return [
        f"{source.name}: prompts of the form {source.form}, {source.train:,} pairs in an epoch "
        f"(weight {source.weight:g}), {source.held_out:,} held out"
        for source in data.sources
    ]


def pair_sample(row: PairTokens, tokenizer: Any) -> Text:
    """A pair in words: the prompt, then each answer between ▶ and ◀."""
    shown = Text(tokenizer.decode(row.prompt_ids), style="dim")
    shown.append("\nchosen:   ").append(f"▶{tokenizer.decode(row.chosen_ids)}◀", style="green")
    shown.append("\nrejected: ").append(f"▶{tokenizer.decode(row.rejected_ids)}◀", style="red")
    return shown


def _split(
    pairs: list[PairTokens], report: LengthReport, ends: Collection[int], tokenizer: Any
) -> SplitCheck:
    halves = [(len(its.chosen_ids), len(its.rejected_ids)) for its in pairs]
    return SplitCheck.of(
        report,
        [len(its.prompt_ids) + max(half) for its, half in zip(pairs, halves, strict=True)],
        sum(map(sum, halves)),
        without_end([Tokens("", its.chosen_ids, its.chosen_ids) for its in pairs], ends, tokenizer),
    )


def _said(pair: Pair) -> Said:
    """Both halves, whichever is preferred; the label is the preferred one."""
    halves = sorted((pair.chosen.text, pair.rejected.text))
    return Said(pair.place, "\n".join(halves), pair.chosen.text)


def _warnings_on_pairs(said: list[Said], longer: int, training: SplitCheck) -> list[str]:
    found = []
    odd = contradictions(said)
    if odd.rows and odd.example:
        found.append(
            f"{share(odd.rows, training.rows)} training pairs prefer the answer that an earlier "
            f"one avoids, as {odd.example['row']} and {odd.example['same_as']}. One of the two is "
            f"the wrong way round."
        )
    if longer > LOPSIDED * training.kept:
        found.append(
            f"in {share(longer, training.kept)} training pairs the chosen answer is the longer, "
            f"and DPO learns that, too: answers may grow without becoming better. Balance the "
            f"pairs, or look at the lengths of what the model then writes."
        )
    return found
