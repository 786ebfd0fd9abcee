"""The rows of a language model made ready and looked over; no weight of a model is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.text import Text

from .data_chat import is_empty
from .data_check import (
    DataCheck,
    Said,
    SplitCheck,
    repeats_between,
    repeats_within,
    share,
    warnings_on_lengths,
    warnings_on_repeats,
)
from .data_sft import Sample, SftData
from .end_tokens import warnings_on_ends, without_end
from .lengths import Limit
from .settings import Settings
from .tokenise_chat import template_names
from .tokenise_sft import IGNORED, Tokens, tokenise_samples


@dataclass(frozen=True)
class SftRows:
    """Training and held-out rows as token ids, and what there is to say of them."""

    train: list[Tokens]
    held_out: list[Tokens]
    notes: list[str]
    check: DataCheck


def prepare_rows(
    settings: Settings, data: SftData, tokenizer: Any, limit: Limit, ends: Collection[int]
) -> SftRows:
    """Tokenise a run's samples and check them; `ends` are the ids at which the model stops."""
    completions, most = settings.training.completion_only_loss, settings.data.max_rows
    notes = _source_notes(data)
    rows: dict[str, list[Tokens]] = {"training": [], "held-out": []}
    checks: dict[str, SplitCheck] = {}
    for what, samples in (("training", data.train), ("held-out", data.held_out)):
        if samples:
            rows[what], report = tokenise_samples(
                samples, tokenizer, limit, what, completions, most, data.bad
            )
            checks[what] = SplitCheck.of(
                report,
                [len(row.input_ids) for row in rows[what]],
                sum(label != IGNORED for row in rows[what] for label in row.labels[1:]),
                without_end(rows[what], ends, tokenizer),
            )
            notes.append(checks[what].note(what, report))
    # From here on without the chats that the template refused.
    data = replace(
        data,
        train=[its for its in data.train if its.place not in data.bad],
        held_out=[its for its in data.held_out if its.place not in data.bad],
    )
    if data.left_out:
        notes.append(f"left out: {data.left_out} rows with an empty completion")
    notes += data.bad.notes()
    said = {
        what: [Said(its.place, its.text) for its in samples if not its.whole_text]
        for what, samples in (("training", data.train), ("held-out", data.held_out))
    }
    check = DataCheck(
        [asdict(source) for source in data.sources],
        checks["training"],
        checks.get("held-out"),
        repeats_within(said["training"]),
        repeats_between(said["held-out"], said["training"]),
        _empty(data),
        data.bad.to_dict(),
    )
    for what, split in checks.items():
        check.warnings += warnings_on_lengths(split, what, limit.length)
        check.warnings += _warnings_on_turns(split, what)
    chats = any(source.form == "messages" for source in data.sources)
    check.warnings += warnings_on_ends(check.training, chats, ends, tokenizer)
    check.warnings += warnings_on_repeats(check)
    check.warnings += _warnings_on_samples([*data.train, *data.held_out], tokenizer)
    check.warnings += [
        f"{count:,} row(s) have {what}; look whether they are whole."
        for what, count in check.empty.items()
    ]
    return SftRows(rows["training"], rows["held-out"], notes, check)


def masked_sample(row: Tokens, tokenizer: Any) -> Text:
    """Decode a row: what the loss counts is green and stands between ▶ and ◀."""
    shown = Text()
    start = 0
    while start < len(row.input_ids):
        counted = row.labels[start] != IGNORED
        stop = start
        while stop < len(row.input_ids) and (row.labels[stop] != IGNORED) == counted:
            stop += 1
        piece = tokenizer.decode(row.input_ids[start:stop])
        shown.append(f"▶{piece}◀" if counted else piece, style="green" if counted else "dim")
        start = stop
    return shown


def _source_notes(data: SftData) -> list[str]:
    training = [source for source in data.sources if source.train]
    if len(training) == 1 and training[0].weight == 1:
        return [f"form: {training[0].form}"]
    return [
        f"{source.name}: form {source.form}, {source.train:,} samples in an epoch (weight "
        f"{source.weight:g}), {source.held_out:,} held out"
        for source in data.sources
    ]


def _warnings_on_turns(split: SplitCheck, what: str) -> list[str]:
    """What of the chats is not learnt."""
    found = []
    if split.unlearnt_turns:
        found.append(
            f"{share(split.unlearnt_turns, split.turns)} turns of the assistant in the {what} rows "
            f"are not learnt: the chat template refuses a chat that ends with them, or drops words "
            f"of them (such as thoughts) once others follow. Give each such answer a row of its "
            f"own, at the end of its chat, or name a data.chat_template that keeps it."
        )
    if split.shortened_turns:
        found.append(
            f"{share(split.shortened_turns, split.turns)} turns of the assistant in the {what} "
            f"rows are learnt without words of theirs, such as thoughts, which the chat template "
            f"leaves out wherever a turn stands: look at `msplora data`. Name a data.chat_template "
            f"that writes them."
        )
    return found


def _warnings_on_samples(samples: list[Sample], tokenizer: Any) -> list[str]:
    """What the chat template has no place for."""
    found = []
    with_tools = sum(bool(its.tools) for its in samples)
    calling = sum(any("tool_calls" in turn for turn in its.messages) for its in samples)
    if with_tools and not template_names(tokenizer, "tools"):
        found.append(
            f"{share(with_tools, len(samples))} rows have tools, but the chat template has no "
            f"place for them, so the model does not see which there are. Name another in "
            f"data.chat_template."
        )
    if calling and not template_names(tokenizer, "tool_calls"):
        found.append(
            f"{share(calling, len(samples))} rows have calls of tools, but the chat template knows "
            f"none, so they are learnt as text of JSON. Name another in data.chat_template for a "
            f"form of its own."
        )
    told = [its.template_options for its in samples if its.template_options]
    unread = {name: None for its in told for name in its if not template_names(tokenizer, name)}
    if unread:
        found.append(
            f"{share(sum(not unread.keys().isdisjoint(its) for its in told), len(samples))} rows "
            f"set {', '.join(unread)} in chat_template_kwargs, which the chat template does not "
            f"name, so it changes nothing. Name another in data.chat_template."
        )
    return found


def _empty(data: SftData) -> dict[str, int]:
    counts = Counter({"an empty completion": data.left_out, "an empty prompt": data.unprompted})
    counts["an empty turn of the assistant"] = sum(
        any(turn["role"] == "assistant" and is_empty(turn) for turn in sample.messages)
        for sample in (*data.train, *data.held_out)
    )
    return {what: count for what, count in counts.items() if count}
