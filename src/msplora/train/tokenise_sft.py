"""Samples to token ids, and which of them the loss counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .data_files import DataError
from .data_sft import Form, Sample
from .lengths import LengthReport, Limit, keep, refuse_if_none_left

IGNORED = -100
"""The label that the loss does not count."""

DEFAULT_CHUNK = 256
"""Tokens per chunk of a plain text file, where data.max_length is unset."""


@dataclass(frozen=True)
class Tokens:
    """Token ids of one training row, and their labels: the id again, or `IGNORED`."""

    place: str
    input_ids: list[int]
    labels: list[int]


def tokenise_samples(
    samples: list[Sample],
    form: Form,
    tokenizer: Any,
    limit: Limit,
    what: str,
    completion_only: bool = True,
    max_chunks: int | None = None,
) -> tuple[list[Tokens], LengthReport]:
    """Return the rows to learn from, and what became of those that were too long.

    `max_chunks` bounds the rows of a text file, which only become rows here.
    """
    report = LengthReport()
    if form == "text-file":
        length = limit.length or min(DEFAULT_CHUNK, limit.positions or DEFAULT_CHUNK)
        rows = [chunk for sample in samples for chunk in _chunks(sample, tokenizer, length)]
        rows = rows[:max_chunks]
        report.rows, report.longest = len(rows), max(len(row.input_ids) for row in rows)
        return rows, report
    rows = []
    for sample in samples:
        row = whole_row(sample, tokenizer)
        if not keep(len(row.input_ids), row.place, limit, report):
            continue
        if not completion_only:
            row = Tokens(row.place, row.input_ids, list(row.input_ids))
        cut = Tokens(row.place, row.input_ids[: limit.length], row.labels[: limit.length])
        # A prompt that fills the row leaves nothing to learn; the first label is never predicted.
        if any(label != IGNORED for label in cut.labels[1:]):
            rows.append(cut)
        else:
            report.truncated -= len(cut.input_ids) < len(row.input_ids)
            report.empty += 1
    refuse_if_none_left(rows, limit, what)
    return rows, report


def whole_row(sample: Sample, tokenizer: Any) -> Tokens:
    """Return the tokens of a sample, however many they are."""
    return _chat(sample, tokenizer) if sample.messages else _completion(sample, tokenizer)


def prompt_ids(sample: Sample, tokenizer: Any) -> list[int]:
    """Return the ids that a model continues from, for generation."""
    if sample.messages:
        text = _render(sample, sample.messages, tokenizer, add_generation_prompt=True)
        return _encode(tokenizer, text, special=False)
    ids = _encode(tokenizer, sample.prompt)
    # Tokenizers of the BERT kind close a text with their end token; nothing would follow it.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    # verbose=False: a row beyond the tokenizer's own idea of a maximum is handled by `lengths`.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _completion(sample: Sample, tokenizer: Any) -> Tokens:
    """The prompt's tokens ignored, then the completion's and the end token.

    Both are tokenised together, as they will be read. A token that holds the end of the prompt and
    the start of the completion counts as completion: it must be predicted.
    """
    ids = _encode(tokenizer, sample.prompt + sample.completion)
    end = tokenizer.eos_token_id
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
    learnt_from = 0
    if sample.prompt:
        for its, alone in zip(ids, _encode(tokenizer, sample.prompt), strict=False):
            if its != alone:
                break
            learnt_from += 1
    return Tokens(sample.place, ids, [IGNORED] * learnt_from + ids[learnt_from:])


def _chunks(sample: Sample, tokenizer: Any, length: int) -> list[Tokens]:
    ids = _encode(tokenizer, sample.completion, special=False)
    opening = _encode(tokenizer, "")[:1]
    # A model trained to read a start token first gets one before every chunk.
    opening = opening if opening == [tokenizer.bos_token_id] else []
    step = length - len(opening)
    chunks = []
    for number, start in enumerate(range(0, len(ids), step), 1):
        chunk = opening + ids[start : start + step]
        if len(chunk) > 1:  # a single token has nothing before it to be predicted from
            chunks.append(Tokens(f"{sample.place}, chunk {number}", chunk, list(chunk)))
    if not chunks:
        raise DataError(f"{sample.place} is too short: it gives fewer than two tokens.")
    return chunks


def _chat(sample: Sample, tokenizer: Any) -> Tokens:
    """A rendered chat, of which the loss counts the assistant's turns and their end tokens.

    Where a turn begins and ends is found by rendering the chat up to it. A template that renders
    earlier turns differently once later ones follow (some drop their reasoning) breaks this for
    those turns; then only the last one is learnt, which is what such a model sees in use.
    """
    whole = _render(sample, sample.messages, tokenizer)
    turns = [
        place for place, message in enumerate(sample.messages) if message["role"] == "assistant"
    ]
    spans = [_span(sample, place, whole, tokenizer) for place in turns]
    learnt = [span for span in spans if span]
    if len(learnt) < len(turns):
        learnt = [spans[-1]] if spans[-1] else []
    if not learnt:
        raise DataError(
            f"{sample.place}: the chat template renders the assistant's turn differently when it "
            f"is alone, so the loss mask cannot be found. Name another data.chat_template."
        )
    if not tokenizer.is_fast:
        raise DataError(
            f"{sample.place} is a chat, and the tokenizer {type(tokenizer).__name__} cannot say "
            f"which characters a token covers, so the loss mask cannot be found. Name a fast one "
            f"(with a tokenizer.json) as tokenizer."
        )
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    labels = [
        its
        # By the start, since some tokenizers take spaces off a token's span, down to an empty one;
        # or by the end, since a token that also holds the end of the prompt must be predicted too.
        if any(low <= start < high or start < low < end for low, high in learnt)
        else IGNORED
        for its, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return Tokens(sample.place, ids, labels)


def _span(sample: Sample, turn: int, whole: str, tokenizer: Any) -> tuple[int, int] | None:
    before = _render(sample, sample.messages[:turn], tokenizer, add_generation_prompt=True)
    through = _render(sample, sample.messages[: turn + 1], tokenizer)
    if not through.startswith(before):
        # Some templates open the turn with something that only a fresh answer gets.
        before = _render(sample, sample.messages[:turn], tokenizer)
    if through.startswith(before) and whole.startswith(through):
        return len(before), len(through)
    return None


def _render(
    sample: Sample, messages: Any, tokenizer: Any, add_generation_prompt: bool = False
) -> str:
    if not messages:
        return ""
    if not tokenizer.chat_template:
        raise DataError(
            f"{sample.place} is a chat, but the tokenizer has no chat template. Use a chat model, "
            f"name a Jinja file in data.chat_template, or bring the data into prompt-completion "
            f"form."
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tools=list(sample.tools) if sample.tools else None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template raises whatever its author wrote
        raise DataError(f"{sample.place}: the chat template refuses the chat: {error}") from error
