"""Which form the rows of a language model have, by their fields, and the names of those."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from msplora.errors import nearest

from .bad_rows import BadRows
from .data_chat import FLAGS
from .data_files import DataError, Row

Form = Literal["text", "prompt-completion", "alpaca", "messages", "text-file"]

_FORMS: dict[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}

WITHOUT_PROMPTS: tuple[Form, ...] = ("text", "text-file")

_ANSWERS = ("completion", "output", "chosen", "rejected")


def detect_form(
    rows: list[Row],
    columns: Mapping[str, str],
    unanswered: bool = False,
    bad: BadRows | None = None,
) -> Form:
    """Return the one form that all rows have, but for bad ones."""
    bad = bad or BadRows()
    return one_form(rows, lambda row: _form_of(row, columns, unanswered), bad)


def one_form(rows: list[Row], form_of: Callable[[Row], Form], bad: BadRows) -> Form:
    """The form that all rows have in common; those of no form are bad."""

    def has_form(row: Row) -> bool:
        try:
            return bool(form_of(row))
        except DataError:
            return False

    if not any(map(has_form, rows)):
        bad = BadRows()  # what every row lacks is not a matter of single rows
    found: dict[Form, Row] = {}
    for row in rows:
        with bad.at(row.place):
            found.setdefault(form_of(row), row)
    (form, first), *others = found.items()
    for its, row in others:
        raise DataError(
            f"mixed forms: {first.place} is of the form {form!r}, but {row.place} is {its!r}. Put "
            f"them in separate files, or bring them into one form."
        )
    return form


def named(row: Row, columns: Mapping[str, str], unanswered: bool = False) -> Row:
    """The row with its columns renamed to the form's fields, and every chat under `messages`."""
    values = dict(row.values)
    # All from the row as it is, so that columns may also change places.
    fields: dict[str, Any] = {}
    for name, column in columns.items():
        if column in values:
            fields[name] = values[column]
        elif not (unanswered and name in _ANSWERS):
            raise DataError(
                f"{row.place}: no column {column!r} (data.columns.{name}). It has: "
                f"{', '.join(map(str, values)) or 'none'}.{nearest(column, map(str, values), 1)}"
            )
    values = {key: its for key, its in values.items() if key not in columns.values()} | fields
    # A table that joins two data sets has nulls under the name that the other one has.
    if "conversations" in values and values.get("messages") is None:
        values["messages"] = values.pop("conversations")
    if "messages" not in values and isinstance(values.get("prompt"), list):
        answer = [] if unanswered else values.get("completion")
        if isinstance(answer, (list, dict)):
            values["messages"] = _joined(values["prompt"], answer)
    return Row(row.place, values)


def _joined(prompt: list[Any], answer: list[Any] | dict[str, Any]) -> list[Any]:
    """TRL's chats in two parts, as one of which the turns of the prompt are not learnt."""
    asked = [
        {key: its for key, its in turn.items() if key not in FLAGS} | {"weight": 0}
        if isinstance(turn, dict)
        else turn
        for turn in prompt
    ]
    return [*asked, *(answer if isinstance(answer, list) else [answer])]


def fits(row: Row, form: Form, unanswered: bool) -> bool:
    """Whether a row has all fields of a form."""
    return form in _FORMS and all(
        row.values.get(name) is not None for name in _needed(form, unanswered)
    )


def _needed(form: Form, unanswered: bool) -> list[str]:
    return [name for name in _FORMS[form] if not (unanswered and name in _ANSWERS)]


def _form_of(row: Row, columns: Mapping[str, str], unanswered: bool = False) -> Form:
    its = named(row, columns, unanswered)
    for form in _FORMS:
        if fits(its, form, unanswered):
            return form
    refuse_nulls(row, its, [_needed(form, unanswered) for form in _FORMS])
    known = [name for fields in _FORMS.values() for name in fields]
    unknown = [str(name) for name in its.values if name not in known]
    hints = {nearest(name, known, count=1) for name in unknown} - {""}
    raise DataError(
        f"{row.place}: the columns {', '.join(map(str, its.values)) or '(none)'} fit no form. "
        f"Known: text; prompt and completion; instruction, input and output; messages (or "
        f"conversations). Name yours in data.columns, as in {{prompt: question, completion: "
        f"answer}}." + "".join(sorted(hints)[:1])
    )


def refuse_nulls(row: Row, renamed: Row, forms: Iterable[Sequence[str]]) -> None:
    """Raise where a row has all fields of a form, and no more than nulls under some of them."""
    nulls = [
        [name for name in fields if renamed[name] is None]
        for fields in forms
        if all(name in renamed.values for name in fields)
    ]
    for names in sorted(filter(None, nulls), key=len):
        chat = "conversations" if "conversations" in row.values else "messages"
        said = [chat if its == "messages" else its for its in names]
        are = "is null" if len(said) == 1 else "are null"
        raise DataError(f"{row.place}: {' and '.join(map(repr, said))} {are}.")
