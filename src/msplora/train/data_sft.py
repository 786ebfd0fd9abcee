"""Rows for supervised fine-tuning: text, prompt-completion, alpaca or chat messages, detected."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from msplora.errors import nearest

from .data_files import DataError, Row, read_rows, read_text
from .data_split import read_splits
from .settings import DataSettings

Form = Literal["text", "prompt-completion", "alpaca", "messages", "text-file"]

_FORMS: dict[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}

_ANSWERS = ("completion", "output", "chosen", "rejected")

# The names that chat data goes by -> the roles that chat templates know.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}


@dataclass(frozen=True)
class Sample:
    """What is learnt from one row: a completion after a prompt (perhaps empty), or a chat."""

    place: str
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class SftData:
    """Samples to train on and to hold out, and the form they had.

    `left_out` counts rows without a completion: there is nothing to learn from them.
    """

    form: Form
    train: list[Sample]
    held_out: list[Sample]
    left_out: int = 0


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Render the prompt of an alpaca row; the output follows it directly."""
    parts = [f"### Instruction:\n{instruction}\n\n"]
    if input:
        parts.append(f"### Input:\n{input}\n\n")
    return "".join([*parts, "### Response:\n"])


def read_sft(data: DataSettings, seed: int) -> SftData:
    """Return the samples of a run's data."""
    if data.train and Path(data.train).suffix.lower() == ".txt":
        return _read_text_file(data)
    train_rows, held_out_rows = read_splits(data, seed)
    form = detect_form(train_rows, data.columns)
    train = samples(train_rows, form, data.columns)
    held_out = samples(held_out_rows, form, data.columns) if held_out_rows else []
    if not train:
        raise DataError(f"{train_rows[0].place} and all rows after it have an empty completion.")
    rows = len(train_rows) + len(held_out_rows)
    return SftData(form, train, held_out, left_out=rows - len(train) - len(held_out))


def read_more_sft(
    file: str, form: Form, data: DataSettings, unanswered: bool = False
) -> list[Sample]:
    """Return the samples of another file of the same form; `unanswered` ones need no completion."""
    if form == "text-file":
        return [Sample(file, completion=read_text(file))]
    rows = read_rows(file)
    found = samples(rows, form, data.columns, unanswered)
    if not found:
        raise DataError(f"{file}: every row has an empty completion.")
    return found


def _read_text_file(data: DataSettings) -> SftData:
    assert data.train
    text = read_text(data.train)
    if data.validation:
        held_out = [Sample(data.validation, completion=read_text(data.validation))]
        return SftData("text-file", [Sample(data.train, completion=text)], held_out)
    # The end of the file, not chunks from all over it: neighbours of a held-out chunk give it away.
    # Cut at a line's end where there is one.
    cut = int(len(text) * (1 - data.validation_fraction))
    cut = text.rfind("\n", 0, cut) + 1 or cut
    held_out = [Sample(data.train, completion=text[cut:])] if text[cut:].strip() else []
    if not data.validation_fraction:
        cut, held_out = len(text), []
    return SftData("text-file", [Sample(data.train, completion=text[:cut])], held_out)


def detect_form(rows: list[Row], columns: Mapping[str, str]) -> Form:
    """Return the one form that all rows have."""
    form = _form_of(rows[0], columns)
    for row in rows[1:]:
        its = _form_of(row, columns)
        if its != form:
            raise DataError(
                f"mixed forms: {rows[0].place} is of the form {form!r}, but {row.place} is "
                f"{its!r}. Put them in separate files, or bring them into one form."
            )
    return form


def samples(
    rows: list[Row], form: Form, columns: Mapping[str, str], unanswered: bool = False
) -> list[Sample]:
    """Return the samples of `rows`, without those that have nothing to learn."""
    found = [_sample(named(row, columns, unanswered), form, unanswered) for row in rows]
    return [
        sample for sample in found if unanswered or sample.messages or sample.completion.strip()
    ]


def named(row: Row, columns: Mapping[str, str], unanswered: bool = False) -> Row:
    """The row with its columns renamed to the form's fields, and sharegpt's list to `messages`."""
    values = dict(row.values)
    for name, column in columns.items():
        if column not in values:
            if unanswered and name in _ANSWERS:
                continue
            raise DataError(
                f"{row.place}: no column {column!r} (data.columns.{name}). It has: "
                f"{', '.join(map(str, values)) or 'none'}.{nearest(column, map(str, values), 1)}"
            )
        values[name] = values.pop(column)
    if "conversations" in values and "messages" not in values:
        values["messages"] = values.pop("conversations")
    return Row(row.place, values)


def _form_of(row: Row, columns: Mapping[str, str]) -> Form:
    values = named(row, columns).values
    for form, fields in _FORMS.items():
        if all(values.get(field) is not None for field in fields):
            return form
    known = [field for fields in _FORMS.values() for field in fields]
    unknown = [str(name) for name in values if name not in known]
    hints = {nearest(name, known, count=1) for name in unknown} - {""}
    raise DataError(
        f"{row.place}: the columns {', '.join(map(str, values)) or '(none)'} fit no form. Known: "
        f"text; prompt and completion; instruction, input and output; messages (or conversations). "
        f"Name yours in data.columns, as in {{prompt: question, completion: answer}}."
        + "".join(sorted(hints)[:1])
    )


def _sample(row: Row, form: Form, unanswered: bool) -> Sample:
    if form == "messages":
        return _chat(row, unanswered)
    if form == "text":
        return Sample(row.place, completion=_string(row, "text"))
    completion = "completion" if form == "prompt-completion" else "output"
    answer = "" if unanswered else _string(row, completion)
    if form == "prompt-completion":
        return Sample(row.place, _string(row, "prompt"), answer)
    extra = _string(row, "input") if row.values.get("input") is not None else ""
    return Sample(row.place, alpaca_prompt(_string(row, "instruction"), extra), answer)


def _string(row: Row, field: str) -> str:
    value = row.values.get(field)
    if value is None:
        has = [str(name) for name, its in row.values.items() if its is not None]
        raise DataError(f"{row.place}: no {field!r}. It has: {', '.join(has) or 'nothing'}.")
    if not isinstance(value, str):
        raise DataError(
            f"{row.place}: {field!r} holds a {type(value).__name__}, not text. Chat turns go under "
            f"'messages'."
        )
    return value


def _chat(row: Row, unanswered: bool) -> Sample:
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{row.place}: 'messages' must be a list of turns and hold at least one.")
    messages = [_turn(row.place, number, turn) for number, turn in enumerate(turns, 1)]
    system = row.values.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if unanswered:
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
    elif not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{row.place}: no turn of the assistant, so nothing to learn.")
    return Sample(row.place, messages=tuple(messages), tools=_tools(row))


def _turn(place: str, number: int, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise DataError(f"{place}, turn {number}: found a {type(turn).__name__}, not an object.")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if role not in ROLES:
        raise DataError(
            f"{place}, turn {number}: role {role!r} is none of {', '.join(ROLES)}."
            + nearest(str(role), ROLES, count=1)
        )
    if not isinstance(content, str):
        raise DataError(
            f"{place}, turn {number}: the content is a {type(content).__name__}, not text."
        )
    return {"role": ROLES[role], "content": content}


def _tools(row: Row) -> tuple[dict[str, Any], ...] | None:
    tools = row.values.get("tools")
    if not tools:
        return None
    try:
        parsed = json.loads(tools) if isinstance(tools, str) else tools
    except json.JSONDecodeError as error:
        raise DataError(f"{row.place}: 'tools' is not valid JSON: {error.msg}.") from None
    return tuple(parsed) or None
