"""Preference pairs: one prompt, an answer to prefer and one to avoid, in the forms they come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msplora.errors import nearest

from .bad_rows import BadRows
from .data_chat import FLAGS, ROLES, THOUGHTS, parsed, role_of
from .data_files import DataError, Row, read_rows
from .data_forms import Form, named, one_form, refuse_nulls
from .data_sft import (
    Sample,
    SourceOfSamples,
    columns_known,
    columns_of,
    refuse_if_none_left,
    samples,
    sources_of,
    whole_sources,
)
from .data_split import read_parts
from .settings_data import DataSettings

_KNOWN = ("prompt", "instruction", "messages", "conversations", "chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """Two samples that differ in the answer alone: the completion, or the last turn of the chat."""

    chosen: Sample
    rejected: Sample

    @property
    def place(self) -> str:
        """Where the row stands."""
        return self.chosen.place


@dataclass(frozen=True)
class PreferenceData:
    """Pairs to train on and to hold out, and the sources they are from.

    `alike` counts rows left out since both answers are the same, `empty` those without an answer.
    `bad` are the rows that are no pair, to which those come that the chat template refuses.
    """

    sources: list[SourceOfSamples]
    train: list[Pair]
    held_out: list[Pair]
    alike: int = 0
    empty: int = 0
    bad: BadRows = field(default_factory=BadRows)

    @property
    def forms(self) -> tuple[Form, ...]:
        """Every form of the prompts once, which are some of sft's."""
        return tuple(dict.fromkeys(its.form for its in self.sources if its.train))


def read_preferences(data: DataSettings, seed: int) -> PreferenceData:
    """Return the pairs of a run's data."""
    splits = read_parts(data, seed)
    parts, bad = [*splits.train, *splits.held_out], BadRows(data.bad_rows)
    forms: dict[str, Form] = {
        name: _form(part.rows, columns_of(part.source, data), bad)
        for name, part in whole_sources(parts).items()
    }
    found = [
        _pairs(part.rows, forms[part.name], columns_of(part.source, data), bad) for part in parts
    ]
    pairs = [its for its, _, _ in found]
    train, held_out = pairs[: len(splits.train)], pairs[len(splits.train) :]
    refuse_if_none_left(
        bad, splits, train, held_out, "an empty answer, or the same one twice, so nothing to prefer"
    )
    return PreferenceData(
        sources_of(splits, forms, train, held_out),
        [pair for its in train for pair in its],
        [pair for its in held_out for pair in its],
        alike=sum(its for _, its, _ in found),
        empty=sum(its for _, _, its in found),
        bad=bad,
    )


def read_more_preferences(
    file: str, forms: Sequence[Form], data: DataSettings
) -> tuple[list[Pair], int]:
    """Return the pairs of another file, whose prompts have one of the forms; and how many rows were
    left out, whose answers are alike or of which one is empty.
    """
    rows = read_rows(file)
    form, columns = _form_of_more(rows, data)
    if form not in forms:
        raise DataError(
            f"{file}: its prompts are of the form {form!r}, and the run was trained on "
            f"{' and '.join(map(repr, forms))}."
        )
    found, _, _ = _pairs(rows, form, columns, BadRows())
    if not found:
        raise DataError(f"{file}: every row has an empty answer, or the same one twice.")
    return found, len(rows) - len(found)


def read_prompts(rows: list[Row], forms: Sequence[Form], data: DataSettings) -> list[Sample]:
    """Return the prompts of rows whose answers, if there are any, are not read.

    They are of the first of `forms` that all rows fit.
    """
    for columns in columns_known(data):
        for form in forms:
            try:
                return _prompts(rows, form, columns)
            except DataError:
                continue
    return _prompts(rows, forms[0], data.columns)  # which says what they lack


def _prompts(rows: list[Row], form: Form, columns: Mapping[str, str]) -> list[Sample]:
    asked = [named(row, columns, unanswered=True) for row in rows]
    asked = map(_chat_prompt, asked) if form == "messages" else asked
    return samples(list(asked), form, {}, unanswered=True)


def _form_of_more(rows: list[Row], data: DataSettings) -> tuple[Form, Mapping[str, str]]:
    """The form of rows of another file, and the first columns of the run's sources that they have.

    Where they have none, the error is that of the columns of the data section.
    """
    refused = []
    for columns in columns_known(data):
        try:
            return _form(rows, columns, BadRows()), columns
        except DataError as error:
            refused.append(error)
    raise refused[0]


def _form(rows: list[Row], columns: Mapping[str, str], bad: BadRows) -> Form:
    """The one form that all prompts have."""
    return one_form(rows, lambda row: _form_of(row, named(row, columns)), bad)


def _form_of(written: Row, row: Row) -> Form:
    values = {name: value for name, value in row.values.items() if value is not None}
    missing = [name for name in ("chosen", "rejected") if name not in values]
    if missing or not _has_prompt(values):
        prompts = ("prompt",), ("instruction",), ("messages",)
        refuse_nulls(written, row, [("chosen", "rejected", *its) for its in prompts])
        lacks = " and ".join(map(repr, missing)) or "a prompt"
        unknown = [str(name) for name in row.values if name not in _KNOWN]
        hints = {nearest(name, _KNOWN, count=1) for name in unknown} - {""}
        raise DataError(
            f"{row.place}: the columns {', '.join(map(str, row.values)) or '(none)'} are no "
            f"preference pair: {lacks} is missing. A pair has chosen and rejected, and a prompt: "
            f"prompt; instruction and input; or messages (or conversations). Name yours in "
            f"data.columns, as in {{prompt: question}}." + "".join(sorted(hints)[:1])
        )
    if "messages" in values or any(
        isinstance(values[name], (list, dict)) for name in ("chosen", "rejected")
    ):
        return "messages"
    if isinstance(values.get("prompt"), list):
        return "messages"
    return "prompt-completion" if "prompt" in values else "alpaca"


def _has_prompt(values: Mapping[str, Any]) -> bool:
    if any(name in values for name in ("prompt", "instruction", "messages")):
        return True
    # Whole chats begin with their prompt.
    return isinstance(values["chosen"], list) and isinstance(values["rejected"], list)


def _pairs(
    rows: list[Row], form: Form, columns: Mapping[str, str], bad: BadRows
) -> tuple[list[Pair], int, int]:
    """The pairs to learn from, and how many were left out as alike and as empty."""
    pairs, alike, empty = [], 0, 0
    for row in rows:
        with bad.at(row.place):
            chosen, rejected = _halves(named(row, columns), form)
            if not chosen or not rejected:
                empty += 1
            elif _answer(chosen) == _answer(rejected):
                alike += 1
            else:
                pairs.append(Pair(chosen, rejected))
    return pairs, alike, empty


def _halves(row: Row, form: Form) -> tuple[Sample | None, Sample | None]:
    """The samples of both answers, or None of one that is empty."""
    if form == "messages":
        turns, answers = _chats(row)
        chosen, rejected = (_half(row, form, "messages", [*turns, its]) for its in answers)
    else:
        answer = "completion" if form == "prompt-completion" else "output"
        chosen, rejected = (
            _half(row, form, answer, _text(row, its)) for its in ("chosen", "rejected")
        )
    return chosen, rejected


def _half(row: Row, form: Form, field: str, value: Any) -> Sample | None:
    """The sample of supervised fine-tuning on one of the two answers, or None if that is empty."""
    found = samples([Row(row.place, {**row.values, field: value})], form, {})
    return found[0] if found and any(_answer(found[0])) else None


def _answer(sample: Sample) -> tuple[Any, ...]:
    """All that an answer says: text, calls of tools, thoughts."""
    if not sample.messages:
        return (sample.completion.strip(),)
    last = sample.messages[-1]
    return (last["content"].strip(), *map(last.get, ("tool_calls", *THOUGHTS)))


def _text(row: Row, name: str) -> str:
    value = row.values.get(name)
    if value is None:
        raise DataError(f"{row.place}: {name!r} is null or missing.")
    if not isinstance(value, str):
        raise DataError(
            f"{row.place}: {name!r} must be text, as its prompt is; found a {type(value).__name__}."
        )
    return value


def _chats(row: Row) -> tuple[list[Any], list[Any]]:
    """The turns of the prompt, and the two turns that answer it."""
    names = ("chosen", "rejected")
    sides = [_as_turns(row, name) for name in names]
    if any(_of_assistant(side[0]) for side in sides):
        turns = _turns(row)
    else:
        # Whole chats: what they have in common is the prompt.
        shared = 0
        for first, second in zip(*sides, strict=False):
            if first != second:
                break
            shared += 1
        shared = min(shared, *(len(side) - 1 for side in sides))
        turns, sides = sides[0][:shared], [side[shared:] for side in sides]
        prompt = row.values.get("prompt")
        if isinstance(prompt, list) and turns and prompt[-len(turns) :] == turns:
            turns = prompt  # which may have a system prompt besides
    answers = [_one_turn(row, name, side) for name, side in zip(names, sides, strict=True)]
    if not turns:
        raise DataError(f"{row.place}: the two chats have no prompt in common.")
    return turns, answers


def _turns(row: Row) -> list[Any]:
    """The prompt's turns, where the answers are no more than answers."""
    prompt = _asked(row)
    if isinstance(prompt, list):
        return prompt
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    found = "nothing" if prompt is None else f"a {type(prompt).__name__}"
    raise DataError(f"{row.place}: the prompt must be text or a list of turns; found {found}.")


def _asked(row: Row) -> Any:
    """The prompt, as turns or as text; of turns that a table has as JSON, what they say."""
    turns = row.values.get("messages")
    return row.values.get("prompt") if turns is None else parsed(turns, row.place, "'messages'")


def _as_turns(row: Row, name: str) -> list[Any]:
    value = row.values.get(name)
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list) and value:
        return value
    found = "nothing" if value is None else f"a {type(value).__name__}"
    raise DataError(
        f"{row.place}: {name!r} must be text, a turn or a list of turns; found {found}."
    )


def _one_turn(row: Row, name: str, side: list[Any]) -> dict[str, Any]:
    if len(side) != 1 or not _of_assistant(side[0]):
        raise DataError(
            f"{row.place}: {name!r} must be one turn of the assistant after the prompt; found "
            f"{len(side)} turn(s) of {', '.join(str(_role(turn)) for turn in side[:4])}."
        )
    # Of a pair, both answers are learnt from.
    return {key: its for key, its in side[0].items() if key not in ("weight", *FLAGS)}


def _role(turn: Any) -> Any:
    return role_of(turn) if isinstance(turn, dict) else None


def _of_assistant(turn: Any) -> bool:
    return ROLES.get(str(_role(turn))) == "assistant"


def _chat_prompt(row: Row) -> Row:
    """The row with its prompt as a chat under `messages`, wherever it stands."""
    prompt = _asked(row)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif prompt is None and isinstance(row.values.get("chosen"), list):
        prompt = row.values["chosen"]  # a whole chat, which begins with it
    return Row(row.place, {**row.values, "messages": prompt})
