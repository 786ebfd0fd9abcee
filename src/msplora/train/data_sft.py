"""Rows for supervised fine-tuning: text, prompt-completion, alpaca or chats, by their fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from msplora.errors import nearest

from .data_chat import FLAGS, chat_text, parsed, read_chat, template_options
from .data_files import DataError, Row
from .data_sources import read_source
from .data_split import Part, Splits, all_rows, read_parts
from .settings_data import DataSettings, DataSource, Sources

Form = Literal["text", "prompt-completion", "alpaca", "messages", "text-file"]

_FORMS: dict[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}

WITHOUT_PROMPTS: tuple[Form, ...] = ("text", "text-file")

_ANSWERS = ("completion", "output", "chosen", "rejected")


@dataclass(frozen=True)
class Sample:
    """What is learnt from one row: a completion after a prompt (perhaps empty), or a chat."""

    place: str
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    template_options: dict[str, Any] | None = None
    """What the row tells the chat template, besides turns and tools."""
    whole_text: bool = False
    """The completion is a text to be cut into chunks, and ends nowhere in particular."""

    @property
    def text(self) -> str:
        """All that it says, to tell whether two are the same."""
        return chat_text(self.messages) if self.messages else self.prompt + self.completion


@dataclass(frozen=True)
class SourceOfSamples:
    """What the notes say of one source: its form, and how many samples it gave."""

    name: str
    form: Form
    weight: float
    train: int
    held_out: int


@dataclass(frozen=True)
class SftData:
    """Samples to train on and to hold out, and the sources they are from.

    `left_out` counts rows without a completion: there is nothing to learn from them. `unprompted`
    counts those whose form has a prompt, and theirs is empty.
    """

    sources: list[SourceOfSamples]
    train: list[Sample]
    held_out: list[Sample]
    left_out: int = 0
    unprompted: int = 0

    @property
    def forms(self) -> tuple[Form, ...]:
        """Every form once; first one that has prompts, into which generating puts them."""
        found: dict[Form, None] = {its.form: None for its in self.sources if its.train}
        return tuple(sorted(found, key=WITHOUT_PROMPTS.__contains__))


def alpaca_prompt(
    instruction: str,
    input: str = "",
    system: str = "",
    history: list[tuple[str, str]] | None = None,
) -> str:
    """Render the prompt of an alpaca row; the output follows it directly."""
    parts = [f"{system}\n\n"] if system else []
    for asked, answered in history or []:
        parts.append(f"### Instruction:\n{asked}\n\n### Response:\n{answered}\n\n")
    parts.append(f"### Instruction:\n{instruction}\n\n")
    if input:
        parts.append(f"### Input:\n{input}\n\n")
    return "".join([*parts, "### Response:\n"])


def read_sft(data: DataSettings, seed: int) -> SftData:
    """Return the samples of a run's data."""
    splits = read_parts(data, seed, whole_texts=True)
    parts = [*splits.train, *splits.held_out]
    forms: dict[str, Form] = {}
    for part in parts:
        if part.name not in forms:  # rows drawn from a source have its form
            forms[part.name] = _form_of_part(part, data)
    found = [_samples_of(part, forms[part.name], data) for part in parts]
    train, held_out = found[: len(splits.train)], found[len(splits.train) :]
    if not any(train):
        place = parts[0].rows[0].place
        raise DataError(f"{place} and all rows after it have an empty completion.")
    return SftData(
        sources_of(splits, forms, train, held_out),
        [sample for its in train for sample in its],
        [sample for its in held_out for sample in its],
        left_out=len(all_rows(parts)) - sum(map(len, found)),
        unprompted=sum(
            forms[part.name] == "prompt-completion" and not sample.prompt.strip()
            for part, its in zip(parts, found, strict=True)
            for sample in its
        ),
    )


def sources_of(
    splits: Splits,
    forms: Mapping[str, Form],
    train: Sequence[Sequence[Any]],
    held_out: Sequence[Sequence[Any]],
) -> list[SourceOfSamples]:
    """Count what came of every source: of its form, and what each part of the splits gave."""
    counts = [
        {part.name: len(its) for part, its in zip(parts, found, strict=True)}
        for parts, found in ((splits.train, train), (splits.held_out, held_out))
    ]
    weights = {part.name: part.source.weight for part in (*splits.held_out, *splits.train)}
    return [
        SourceOfSamples(name, form, weights[name], counts[0].get(name, 0), counts[1].get(name, 0))
        for name, form in forms.items()
    ]


def read_more_sft(
    file: str, forms: Sequence[Form], data: DataSettings, unanswered: bool = False
) -> list[Sample]:
    """Return the samples of another file of one of `forms`; `unanswered` ones need no completion.

    Where no forms are known, it is of the one that its fields say.
    """
    source = DataSource(path=file)
    part = Part(source, read_source(source, not forms or "text-file" in forms))
    form: Form | None = None
    if not part.whole_text:
        of_rows: list[Form] = [form for form in forms if form != "text-file"]
        if forms and not of_rows:
            raise DataError(
                f"{file} has rows, and the run was trained on whole texts; give a .txt."
            )
        form, columns = _form_of_more(part.rows, of_rows, data, unanswered)
        part = Part(source.model_copy(update={"columns": columns}), part.rows)
    found = _samples_of(part, form, data, unanswered)
    if not found:
        raise DataError(f"{file}: every row has an empty completion.")
    return found


def _form_of_more(
    rows: list[Row], forms: Sequence[Form], data: DataSettings, unanswered: bool
) -> tuple[Form, Mapping[str, str]]:
    """The first of the forms, if any are known, that rows have, and what their columns are called.

    Rows that fit none of them get the first one, which says what they lack.
    """
    for columns in columns_known(data):
        try:
            if not forms:
                return detect_form(rows, columns, unanswered), columns
            renamed = [named(row, columns, True) for row in rows]
        except DataError:
            continue
        for form in forms:
            if all(_fits(row, form, True) for row in renamed):
                return form, columns
    return forms[0] if forms else detect_form(rows, data.columns, unanswered), data.columns


def _form_of_part(part: Part, data: DataSettings) -> Form:
    return "text-file" if part.whole_text else detect_form(part.rows, columns_of(part.source, data))


def columns_of(source: DataSource, data: DataSettings) -> Mapping[str, str]:
    """How the columns of a source are called."""
    return data.columns if source.columns is None else source.columns


def columns_known(data: DataSettings) -> list[Mapping[str, str]]:
    """How the columns of another file may be called: as the run's, or as one of its sources'."""
    sources = [*_listed(data.train), *_listed(data.validation)]
    return [data.columns, *(its.columns for its in sources if its.columns is not None)]


def _listed(sources: Sources | None) -> list[DataSource]:
    return sources if isinstance(sources, list) else []


def _samples_of(
    part: Part, form: Form | None, data: DataSettings, unanswered: bool = False
) -> list[Sample]:
    if part.whole_text:
        return [Sample(row.place, completion=row["text"], whole_text=True) for row in part.rows]
    assert form
    return samples(part.rows, form, columns_of(part.source, data), unanswered)


def detect_form(rows: list[Row], columns: Mapping[str, str], unanswered: bool = False) -> Form:
    """Return the one form that all rows have."""
    form = _form_of(rows[0], columns, unanswered)
    for row in rows[1:]:
        its = _form_of(row, columns, unanswered)
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
    if "conversations" in values and "messages" not in values:
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


def _fits(row: Row, form: Form, unanswered: bool) -> bool:
    return form in _FORMS and all(
        row.values.get(field) is not None
        for field in _FORMS[form]
        if not (unanswered and field in _ANSWERS)
    )


def _form_of(row: Row, columns: Mapping[str, str], unanswered: bool = False) -> Form:
    its = named(row, columns, unanswered)
    for form in _FORMS:
        if _fits(its, form, unanswered):
            return form
    known = [field for fields in _FORMS.values() for field in fields]
    unknown = [str(name) for name in its.values if name not in known]
    hints = {nearest(name, known, count=1) for name in unknown} - {""}
    raise DataError(
        f"{row.place}: the columns {', '.join(map(str, its.values)) or '(none)'} fit no form. "
        f"Known: text; prompt and completion; instruction, input and output; messages (or "
        f"conversations). Name yours in data.columns, as in {{prompt: question, completion: "
        f"answer}}." + "".join(sorted(hints)[:1])
    )


def _sample(row: Row, form: Form, unanswered: bool) -> Sample:
    if form == "messages":
        messages, tools = read_chat(row, unanswered)
        return Sample(row.place, "", "", messages, tools, template_options(row))
    if form == "text":
        return Sample(row.place, completion=_string(row, "text"))
    completion = "completion" if form == "prompt-completion" else "output"
    answer = "" if unanswered else _string(row, completion)
    if form == "prompt-completion":
        return Sample(row.place, _string(row, "prompt"), answer)
    prompt = alpaca_prompt(
        _string(row, "instruction"),
        _optional(row, "input"),
        _optional(row, "system"),
        _history(row),
    )
    return Sample(row.place, prompt, answer)


def _optional(row: Row, field: str) -> str:
    return "" if row.values.get(field) is None else _string(row, field)


def _string(row: Row, field: str) -> str:
    value = row.values.get(field)
    if value is None:
        has = [str(name) for name, its in row.values.items() if its is not None]
        raise DataError(f"{row.place}: no {field!r}. It has: {', '.join(has) or 'nothing'}.")
    if not isinstance(value, str):
        chat = isinstance(value, (list, dict))
        advice = (
            "Chat turns go under 'messages', or are lists under both 'prompt' and 'completion'"
            if chat
            else "Put it into quotes"
        )
        raise DataError(
            f"{row.place}: {field!r} holds a {type(value).__name__}, not text. {advice}."
        )
    return value


def _history(row: Row) -> list[tuple[str, str]]:
    """The rounds before an alpaca row's instruction: pairs of an instruction and its answer."""
    history = parsed(row.values.get("history") or [], row.place, "'history'")
    if not isinstance(history, list):
        history = [history]  # which is no pair
    pairs = [pair for pair in history if isinstance(pair, (list, tuple)) and len(pair) == 2]
    if len(pairs) < len(history) or not all(isinstance(its, str) for pair in pairs for its in pair):
        raise DataError(
            f"{row.place}: 'history' is a list of pairs, each an instruction and its answer."
        )
    return [(asked, answered) for asked, answered in pairs]
