"""Samples to token ids, and which of them the loss counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .bad_rows import BadRows
from .data_files import DataError
from .data_sft import Sample
from .lengths import LengthReport, Limit, keep, refuse_if_none_left
from .tokenise_chat import RenderedChat, chat_spans, render_chat
from .waiting import progress

IGNORED = -100
"""The label that the loss does not count."""

DEFAULT_CHUNK = 256
"""Tokens per chunk of a plain text file, where data.max_length is unset."""


_BATCH = 1000
"""Rows that the tokenizer gets at once."""


@dataclass(frozen=True)
class Tokens:
    """Token ids of one training row, and their labels: the id again, or `IGNORED`."""

    place: str
    input_ids: list[int]
    labels: list[int]
    chunk: bool = False
    """Whether it is cut out of a longer text, and ends nowhere in particular."""
    turns: int = 0
    """Of a chat: those of the assistant that are to be learnt."""
    unlearnt_turns: int = 0
    """Those of them that are not, since they could not be found in the rendered chat."""
    shortened_turns: int = 0
    """Those that are, without words that the chat template left out."""


def tokenise_samples(
    samples: list[Sample],
    tokenizer: Any,
    limit: Limit,
    what: str,
    completion_only: bool = True,
    max_chunks: int | None = None,
    bad: BadRows | None = None,
) -> tuple[list[Tokens], LengthReport]:
    """Return the rows to learn from, and what became of those that were too long.

    `max_chunks` bounds the rows that come of a text file, which only become rows here. `bad` takes
    the chats that the template refuses.
    """
    bad = bad or BadRows()
    report = LengthReport()
    rows = []
    for row in _whole_rows(samples, tokenizer, limit, what, max_chunks, bad):
        if row.chunk:
            report.count(len(row.input_ids))
            rows.append(row)
            continue
        if not keep(len(row.input_ids), row.place, limit, report):
            continue
        labels = row.labels if completion_only else row.input_ids
        cut = Tokens(row.place, row.input_ids[: limit.length], labels[: limit.length])
        # A prompt that fills the row leaves nothing to learn; the first label is never predicted.
        if any(label != IGNORED for label in cut.labels[1:]):
            rows.append(cut)
            report.turns += row.turns
            report.unlearnt_turns += row.unlearnt_turns * completion_only
            report.shortened_turns += row.shortened_turns
        else:
            report.truncated -= len(cut.input_ids) < len(row.input_ids)
            report.unlearnt += 1
    if not report.rows:
        bad.refuse_if_none_left(rows, f"{what} row")
    refuse_if_none_left(rows, limit, what)
    return rows, report


def _whole_rows(
    samples: list[Sample],
    tokenizer: Any,
    limit: Limit,
    what: str,
    max_chunks: int | None,
    bad: BadRows,
) -> Iterator[Tokens]:
    """Every row in its full length, in the order of the samples."""
    with progress(f"tokenising the {what} rows", len(samples)) as advance:
        for start in range(0, len(samples), _BATCH):
            batch = samples[start : start + _BATCH]
            # A chat, a text and a completion are each tokenised in their own way.
            chats = iter(_chats([its for its in batch if its.messages], tokenizer, bad))
            plain = [its for its in batch if not its.messages and not its.whole_text]
            completions = iter(_completions(plain, tokenizer))
            for sample in batch:
                if sample.whole_text:
                    length = limit.length or min(DEFAULT_CHUNK, limit.positions or DEFAULT_CHUNK)
                    yield from _chunks(sample, tokenizer, length)[:max_chunks]
                elif row := next(chats if sample.messages else completions):
                    yield row
            advance(len(batch))


def whole_row(sample: Sample, tokenizer: Any) -> Tokens:
    """Return the tokens of one sample that is no whole text, however many they are."""
    if not sample.messages:
        return _completions([sample], tokenizer)[0]
    (row,) = _chats([sample], tokenizer, BadRows())
    assert row  # a bad one is an error here
    return row


def prompt_ids(sample: Sample, tokenizer: Any) -> list[int]:
    """Return the ids that a model continues from, for generation."""
    if sample.messages:
        text = render_chat(sample, tokenizer, add_generation_prompt=True)
        return _encode(tokenizer, [text], special=False)[0]
    (ids,) = _encode(tokenizer, [sample.prompt])
    # Tokenizers of the BERT kind close a text with their end token; nothing would follow it.
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _encode(tokenizer: Any, texts: list[str], special: bool = True) -> list[list[int]]:
    # verbose=False: a row beyond the tokenizer's own idea of a maximum is handled by `lengths`.
    return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"] if texts else []


def _completions(samples: list[Sample], tokenizer: Any) -> list[Tokens]:
    """The prompt's tokens ignored, then the completion's and the end token.

    Both are tokenised together, as they will be read. A token that holds the end of the prompt and
    the start of the completion counts as completion: it must be predicted.
    """
    wholes = _encode(tokenizer, [sample.prompt + sample.completion for sample in samples])
    prompts = _encode(tokenizer, [sample.prompt for sample in samples])
    end = tokenizer.eos_token_id
    rows = []
    for sample, ids, prompt in zip(samples, wholes, prompts, strict=True):
        if end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
        learnt_from = 0
        if sample.prompt:
            for its, alone in zip(ids, prompt, strict=False):
                if its != alone:
                    break
                learnt_from += 1
        rows.append(Tokens(sample.place, ids, [IGNORED] * learnt_from + ids[learnt_from:]))
    return rows


def _chats(samples: list[Sample], tokenizer: Any, bad: BadRows) -> list[Tokens | None]:
    """A rendered chat, of which the loss counts the assistant's turns and their end tokens.

    There is None in the place of each that is bad.
    """
    rendered: dict[int, RenderedChat] = {}
    for number, sample in enumerate(samples):
        with bad.at(sample.place):
            rendered[number] = chat_spans(sample, tokenizer)
    rows: list[Tokens | None] = [None] * len(samples)
    if not rendered:
        return rows
    encoded = tokenizer(
        [its.text for its in rendered.values()],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    for (number, chat), ids, offsets in zip(
        rendered.items(), encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        learnt = bytearray(len(chat.text))  # a byte for each character
        for low, high in chat.spans:
            learnt[low:high] = b"\1" * (high - low)
        labels = [
            # Some tokenizers take spaces off a token's span, down to an empty one. A token that
            # also holds the end of the prompt must be predicted too.
            its if 1 in learnt[start : max(end, start + 1)] else IGNORED
            for its, (start, end) in zip(ids, offsets, strict=True)
        ]
        rows[number] = Tokens(
            samples[number].place,
            ids,
            labels,
            turns=chat.turns,
            unlearnt_turns=chat.unlearnt_turns,
            shortened_turns=chat.shortened_turns,
        )
    return rows


def _chunks(sample: Sample, tokenizer: Any, length: int) -> list[Tokens]:
    (ids,) = _encode(tokenizer, [sample.completion], special=False)
    opening = _encode(tokenizer, [""])[0][:1]
    # A model trained to read a start token first gets one before every chunk.
    opening = opening if opening == [tokenizer.bos_token_id] else []
    step = length - len(opening)
    chunks = []
    for number, start in enumerate(range(0, len(ids), step), 1):
        chunk = opening + ids[start : start + step]
        if len(chunk) > 1:  # a single token has nothing before it to be predicted from
            place = f"{sample.place}, chunk {number}"
            chunks.append(Tokens(place, chunk, list(chunk), chunk=True))
    if not chunks:
        raise DataError(f"{sample.place} is too short: it gives fewer than two tokens.")
    return chunks
