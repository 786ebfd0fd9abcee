"""Rows for supervised fine-tuning: text, prompt-completion, alpaca or chats, by their fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .bad_rows import BadRows
from .data_chat import chat_text, parsed, read_chat, template_options
from .data_files import DataError, Row, refuse_half_characters
from .data_forms import WITHOUT_PROMPTS, Form, detect_form, fits, named
from .data_sources import read_source
from .data_split import Part, Splits, all_rows, read_parts
from .settings_data import DataSettings, DataSource, Sources


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
    counts those whose form has a prompt, and theirs is empty. `bad` are the rows that are no
    samples, to which those come that the chat template refuses.
    """

    sources: list[SourceOfSamples]
    train: list[Sample]
    held_out: list[Sample]
    left_out: int = 0
    unprompted: int = 0
    bad: BadRows = field(default_factory=BadRows)

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
    parts, bad = [*splits.train, *splits.held_out], BadRows(data.bad_rows)
    forms: dict[str, Form] = {
        name: _form_of_part(part, data, bad) for name, part in whole_sources(parts).items()
    }
    found = [_samples_of(part, forms[part.name], data, bad=bad) for part in parts]
    train, held_out = found[: len(splits.train)], found[len(splits.train) :]
    refuse_if_none_left(bad, splits, train, held_out, "an empty completion")
    return SftData(
        sources_of(splits, forms, train, held_out),
        [sample for its in train for sample in its],
        [sample for its in held_out for sample in its],
        left_out=sum(row.place not in bad for row in all_rows(parts)) - sum(map(len, found)),
        unprompted=sum(
            forms[part.name] == "prompt-completion" and not sample.prompt.strip()
            for part, its in zip(parts, found, strict=True)
            for sample in its
        ),
        bad=bad,
    )


def whole_sources(parts: Sequence[Part]) -> dict[str, Part]:
    """The sources by name, each with all that it gave: what is drawn from it has its form."""
    found: dict[str, Part] = {}
    for part in parts:
        its = found.get(part.name)
        found[part.name] = replace(its, rows=[*its.rows, *part.rows]) if its else part
    return found


def refuse_if_none_left(
    bad: BadRows,
    splits: Splits,
    train: Sequence[Sequence[Any]],
    held_out: Sequence[Sequence[Any]],
    empty: str,
) -> None:
    """Raise where all that would be trained on, or judged by, is bad, or has what `empty` says."""
    for what, parts, found in (
        ("training", splits.train, train),
        ("held-out", splits.held_out, held_out),
    ):
        if parts and not any(found):
            if any(row.place in bad for row in all_rows(list(parts))):
                bad.refuse_if_none_left([], f"{what} row")
            advice = ""
            if what == "held-out":
                advice = (
                    " To judge the run, name other rows in data.validation; to do without, leave "
                    "that out and set data.validation_fraction: 0."
                )
            place = parts[0].rows[0].place
            raise DataError(f"{place} and all other {what} rows have {empty}.{advice}")


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
) -> tuple[list[Sample], int]:
    """Return the samples of another file of one of `forms`; `unanswered` ones need no completion.

    Where no forms are known, it is of the one that its fields say. Also returns how many rows were
    left out for want of a completion.
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
        if unanswered and form in WITHOUT_PROMPTS:
            raise DataError(
                f"{file} holds plain text, which has no prompts to answer; use msplora generate "
                f"--prompt."
            )
    found = _samples_of(part, form, data, unanswered)
    if not found:
        raise DataError(f"{file}: every row has an empty completion.")
    return found, len(part.rows) - len(found)


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
            if all(fits(row, form, True) for row in renamed):
                return form, columns
    return forms[0] if forms else detect_form(rows, data.columns, unanswered), data.columns


def _form_of_part(part: Part, data: DataSettings, bad: BadRows) -> Form:
    if part.whole_text:
        return "text-file"
    return detect_form(part.rows, columns_of(part.source, data), bad=bad)


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
    part: Part,
    form: Form | None,
    data: DataSettings,
    unanswered: bool = False,
    bad: BadRows | None = None,
) -> list[Sample]:
    if part.whole_text:
        return [Sample(row.place, completion=row["text"], whole_text=True) for row in part.rows]
    assert form
    return samples(part.rows, form, columns_of(part.source, data), unanswered, bad)


def samples(
    rows: list[Row],
    form: Form,
    columns: Mapping[str, str],
    unanswered: bool = False,
    bad: BadRows | None = None,
) -> list[Sample]:
    """Return the samples of `rows`, without those that have nothing to learn."""
    bad, found = bad or BadRows(), []
    for row in rows:
        with bad.at(row.place):
            found.append(_sample(named(row, columns, unanswered), form, unanswered))
    return [
        sample for sample in found if unanswered or sample.messages or sample.completion.strip()
    ]


def _sample(row: Row, form: Form, unanswered: bool) -> Sample:
    if form == "messages":
        messages, tools = read_chat(row, unanswered)
        return Sample(row.place, "", "", messages, tools, template_options(row))
    if form == "text":
        return Sample(row.place, completion=_string(row, "text"))
    completion = "completion" if form == "prompt-completion" else "output"
    answer = "" if unanswered else _string(row, completion)
    if form == "prompt-completion":
        system, asked = _optional(row, "system"), _string(row, "prompt")
        return Sample(row.place, f"{system}\n\n{asked}" if system else asked, answer)
    prompt = alpaca_prompt(
        _string(row, "instruction"),
        _optional(row, "input"),
        _optional(row, "system"),
        _history(row),
    )
    refuse_half_characters(prompt, row.place)
    return Sample(row.place, prompt, answer)


def _optional(row: Row, field: str) -> str:
    return "" if row.values.get(field) is None else _string(row, field)


def _string(row: Row, field: str) -> str:
    value = row.values.get(field)
    if value is None and field in row.values:
        raise DataError(f"{row.place}: {field!r} is null.")
    if value is None:
        has = [str(name) for name, its in row.values.items() if its is not None]
        raise DataError(f"{row.place}: no {field!r}. It has: {', '.join(has) or 'nothing'}.")
    if not isinstance(value, str):
        chat = isinstance(value, (list, dict))
        advice = (
            "Chat turns go under 'messages', or are lists under both 'prompt' and 'completion'"
            if chat
            else "Write it as text (in JSON: in quotes)"
        )
        raise DataError(
            f"{row.place}: {field!r} holds a {type(value).__name__}, not text. {advice}."
        )
    refuse_half_characters(value, row.place)
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
