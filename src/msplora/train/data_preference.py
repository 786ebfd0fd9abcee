"""Preference pairs: one prompt, an answer to prefer and one to avoid, in the forms they come in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msplora.errors import nearest

from .data_chat import ROLES
from .data_files import DataError, Row, read_rows
from .data_sft import Form, Sample, SourceOfSamples, named, samples, sources_of
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
    """Pairs to train on and to hold out, and the form of their prompts, which is one of sft's.

    `alike` counts rows left out since both answers are the same, `empty` those without an answer.
    """

    form: Form
    sources: list[SourceOfSamples]
    train: list[Pair]
    held_out: list[Pair]
    alike: int = 0
    empty: int = 0


def read_preferences(data: DataSettings, seed: int) -> PreferenceData:
    """Return the pairs of a run's data."""
    splits = read_parts(data, seed)
    parts = [*splits.train, *splits.held_out]
    rows = [
        [named(row, part.source.columns or data.columns) for row in part.rows] for part in parts
    ]
    form = _form([row for its in rows for row in its], {})
    found = [_pairs(its, form, {}) for its in rows]
    pairs = [its for its, _, _ in found]
    train, held_out = pairs[: len(splits.train)], pairs[len(splits.train) :]
    if not any(train):
        raise DataError(
            f"{rows[0][0].place} and all rows after it have an empty answer, or the same one "
            f"twice; there is nothing to prefer."
        )
    return PreferenceData(
        form,
        sources_of(splits, dict.fromkeys((part.name for part in parts), form), train, held_out),
        [pair for its in train for pair in its],
        [pair for its in held_out for pair in its],
        alike=sum(its for _, its, _ in found),
        empty=sum(its for _, _, its in found),
    )


def read_more_preferences(file: str, form: Form, data: DataSettings) -> list[Pair]:
    """Return the pairs of another file, whose prompts have the same form."""
    rows = read_rows(file)
    its = _form(rows, data.columns)
    if its != form:
        raise DataError(
            f"{file}: its prompts are of the form {its!r}, and the run was trained on {form!r}."
        )
    found, _, _ = _pairs(rows, form, data.columns)
    if not found:
        raise DataError(f"{file}: every row has an empty answer, or the same one twice.")
    return found


def read_prompts(rows: list[Row], form: Form, columns: Mapping[str, str]) -> list[Sample]:
    """Return the prompts of rows whose answers, if there are any, are not read."""
    renamed = [named(row, columns, unanswered=True) for row in rows]
    if form == "messages":
        renamed = [_chat_prompt(row) for row in renamed]
    return samples(renamed, form, {}, unanswered=True)


def _form(rows: list[Row], columns: Mapping[str, str]) -> Form:
    """The one form that all prompts have."""
    first = _form_of(named(rows[0], columns))
    for row in rows[1:]:
        its = _form_of(named(row, columns))
        if its != first:
            raise DataError(
                f"mixed forms: the prompt of {rows[0].place} is of the form {first!r}, but that of "
                f"{row.place} is {its!r}. Put them in separate files, or bring them into one form."
            )
    return first


def _form_of(row: Row) -> Form:
    values = {name: value for name, value in row.values.items() if value is not None}
    missing = [name for name in ("chosen", "rejected") if name not in values]
    if missing or not _has_prompt(values):
        lacks = " and ".join(map(repr, missing)) or "a prompt"
        unknown = [str(name) for name in row.values if name not in _KNOWN]
        hints = {nearest(name, _KNOWN, count=1) for name in unknown} - {""}
        raise DataError(
            f"{row.place}: the columns {', '.join(map(str, row.values)) or '(none)'} are no "
            f"preference pair: {lacks} is missing. A pair has chosen and rejected, and a prompt: "
            f"prompt; instruction and input; or messages (or conversations). Name yours in "
            f"data.columns, as in {{prompt: question}}." + "".join(sorted(hints)[:1])
        )
    if "messages" in values or not (
        isinstance(values["chosen"], str) and isinstance(values["rejected"], str)
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


def _pairs(rows: list[Row], form: Form, columns: Mapping[str, str]) -> tuple[list[Pair], int, int]:
    """The pairs to learn from, and how many were left out as alike and as empty."""
    pairs, alike, empty = [], 0, 0
    for its in rows:
        row = named(its, columns)
        if form == "messages":
            turns, chosen, rejected = _chats(row)
        else:
            turns, chosen, rejected = [], _text(row, "chosen"), _text(row, "rejected")
        if not chosen.strip() or not rejected.strip():
            empty += 1
        elif chosen.strip() == rejected.strip():
            alike += 1
        else:
            first, second = (
                samples([_answered(row, form, turns, answer)], form, {})[0]
                for answer in (chosen, rejected)
            )
            pairs.append(Pair(first, second))
    return pairs, alike, empty


def _answered(row: Row, form: Form, turns: list[Any], answer: str) -> Row:
    """The row of supervised fine-tuning that has one of the two answers."""
    values = dict(row.values)
    if form == "messages":
        values["messages"] = [*turns, {"role": "assistant", "content": answer}]
    else:
        values["completion" if form == "prompt-completion" else "output"] = answer
    return Row(row.place, values)


def _text(row: Row, name: str) -> str:
    value = row.values[name]
    if not isinstance(value, str):
        raise DataError(
            f"{row.place}: {name!r} holds a {type(value).__name__}, not text as the rows before."
        )
    return value


def _chats(row: Row) -> tuple[list[Any], str, str]:
    """The turns of the prompt, and the two answers to it."""
    turns = _turns(row)
    sides = [_as_turns(row, name) for name in ("chosen", "rejected")]
    if turns is None:
        # Whole chats: what they have in common is the prompt.
        shared = 0
        for first, second in zip(*sides, strict=False):
            if first != second:
                break
            shared += 1
        shared = min(shared, *(len(side) - 1 for side in sides))
        turns, sides = sides[0][:shared], [side[shared:] for side in sides]
    chosen, rejected = (
        _answer(row, name, side) for name, side in zip(("chosen", "rejected"), sides, strict=True)
    )
    if not turns:
        raise DataError(f"{row.place}: the two chats have no prompt in common.")
    return turns, chosen, rejected


def _turns(row: Row) -> list[Any] | None:
    """The prompt's turns, or None where the answers are whole chats that begin with them."""
    values = row.values
    prompt = values.get("messages")
    if prompt is None:
        prompt = values.get("prompt")
    if isinstance(prompt, list):
        return prompt
    chosen = values["chosen"]
    if isinstance(chosen, list) and chosen and not _of_assistant(chosen[0]):
        return None
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    found = "nothing" if prompt is None else f"a {type(prompt).__name__}"
    raise DataError(f"{row.place}: the prompt must be text or a list of turns; found {found}.")


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


def _answer(row: Row, name: str, side: list[Any]) -> str:
    if len(side) != 1 or not _of_assistant(side[0]):
        raise DataError(
            f"{row.place}: {name!r} must be one turn of the assistant after the prompt; found "
            f"{len(side)} turn(s) of {', '.join(str(_role(turn)) for turn in side[:4])}."
        )
    content = side[0].get("content", side[0].get("value"))
    if not isinstance(content, str):
        raise DataError(
            f"{row.place}: the content of {name!r} is a {type(content).__name__}, not text."
        )
    return content


def _role(turn: Any) -> Any:
    return turn.get("role", turn.get("from")) if isinstance(turn, dict) else None


def _of_assistant(turn: Any) -> bool:
    return ROLES.get(_role(turn)) == "assistant"


def _chat_prompt(row: Row) -> Row:
    """The row with its prompt as a chat under `messages`, wherever it stands."""
    prompt = row.values.get("messages", row.values.get("prompt", row.values.get("chosen")))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return Row(row.place, {**row.values, "messages": prompt})
