"""Chats to text by the tokenizer's template, and which characters of it the assistant said."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from msplora.errors import ConfigError

from .data_chat import THOUGHTS, Message, calls_as_text, is_empty
from .data_files import DataError, refuse_half_characters
from .data_sft import Sample

Span = tuple[int, int]


def render_chat(sample: Sample, tokenizer: Any, add_generation_prompt: bool = False) -> str:
    """Return the chat as text; with the opening of an answer where one is to be generated."""
    text = _render(sample, sample.messages, tokenizer, add_generation_prompt)
    refuse_half_characters(text, sample.place)
    return text


def template_names(tokenizer: Any, name: str) -> bool:
    """Whether the chat template has a place for something, such as `tools` or `tool_calls`."""
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template or ""]
    word = re.compile(rf"\b{re.escape(name)}\b")  # enable_thinking is not thinking
    return any(word.search(text) for text in texts)


@dataclass(frozen=True)
class RenderedChat:
    """A chat as text, and what of it the loss counts: turns of the assistant, and their ends."""

    text: str
    spans: list[Span]
    turns: int
    """Of the assistant, without those whose weight is 0 and empty ones that are not learnt."""
    shortened_turns: int
    """Those of `spans` that lack words of theirs, such as thoughts, which the template left out."""

    @property
    def unlearnt_turns(self) -> int:
        """Turns that could not be found in the text, and are not learnt."""
        return self.turns - len(self.spans)


def chat_spans(sample: Sample, tokenizer: Any) -> RenderedChat:
    """Render a chat and find what of it the loss counts.

    Where a turn begins and ends is found by rendering the chat up to it. Some templates render a
    turn differently once others follow. It is learnt as it then stands in the chat where all that
    it has lost is marks without a word (an empty thought) or its end token. One that has lost
    words, such as its thoughts, is not: it would teach the model to answer without them. Words that
    the template never renders, wherever a turn stands, are no more than counted.
    """
    whole = render_chat(sample, tokenizer)
    turns = [
        place
        for place, message in enumerate(sample.messages)
        if message["role"] == "assistant" and message.get("weight") != 0
    ]
    spans = _spans(sample, turns, whole, tokenizer)
    if not spans:
        raise DataError(
            f"{sample.place}: the chat template renders the assistant's turn differently when it "
            f"is alone, so the loss mask cannot be found. Name another data.chat_template."
        )
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{sample.place} is a chat, and the tokenizer {type(tokenizer).__name__} cannot say "
            f"which characters a token covers, so the loss mask cannot be found. Name a fast one "
            f"(with a tokenizer.json) as tokenizer."
        )
    shortened = sum(
        _lacks_words(whole[slice(*span)], _as_known(sample.messages[turn], tokenizer))
        for turn, span in spans.items()
    )
    # An empty one that is not found loses nothing; that it is empty is said of the data anyway.
    counted = [its for its in turns if its in spans or not is_empty(sample.messages[its])]
    return RenderedChat(whole, list(spans.values()), len(counted), shortened)


def _lacks_words(rendered: str, message: Message) -> bool:
    """Whether some of what a turn says does not stand in it, marks and spaces aside."""
    said = [message["content"], *(message.get(name, "") for name in THOUGHTS)]
    pieces = [piece for text in said for piece in _MARK.split(text)]
    rendered = _WHITE.sub("", rendered)
    return any(_WHITE.sub("", piece) not in rendered for piece in pieces)


def _spans(sample: Sample, turns: list[int], whole: str, tokenizer: Any) -> dict[int, Span]:
    """Where those of the turns stand that can be found."""
    spans: dict[int, Span] = {}
    since = ("", 0)
    for turn in turns:
        through = _try(sample, sample.messages[: turn + 1], tokenizer)
        # What comes before a turn may be rendered as in the whole chat from its beginning, or only
        # from the turn found last: that one may have had a thought while it was the last.
        for known, reached in dict.fromkeys((("", 0), since)):
            if through is not None and through.startswith(known):
                span = _span(sample, turn, known, through, whole[reached:], tokenizer)
                if span:
                    spans[turn] = (reached + span[0], reached + span[1])
                    since = (through, spans[turn][1])
                    break
    return spans


def _span(
    sample: Sample, turn: int, known: str, through: str, whole: str, tokenizer: Any
) -> Span | None:
    """Where a turn stands in a chat, without the mark that opens it.

    `through` is the chat up to the turn, `whole` all of it but for what `known` is of `through`.
    """
    start = _start(sample, turn, known, through, whole, tokenizer)
    through = through[len(known) :]
    if start is None or whole[:start] != through[:start]:
        return None
    alone, stands = through[start:], whole[start:]
    if stands.startswith(alone):
        return start, len(through)
    said = _said(sample, turn, tokenizer)
    spoken = alone.rfind(said) + len(said)
    shared = _in_common(alone, stands)
    if said and said in alone and shared >= spoken:
        return start, start + shared
    marks = _MARKS.match(alone)
    for cut in range(1, marks.end() + 1 if marks else 1):
        if said in alone[cut:] and alone[cut:] and stands.startswith(alone[cut:]):
            return start, len(through) - cut
    return None


_WHITE = re.compile(r"\s+")
_MARK = re.compile(r"<[^<>]*>")
_MARKS = re.compile(rf"(?:\s|{_MARK.pattern})*")
"""What holds no word: white space, and marks such as those around a thought."""


def _start(
    sample: Sample, turn: int, known: str, through: str, whole: str, tokenizer: Any
) -> int | None:
    """Where, after `known`, the last turn of `through` begins to be the assistant's own words."""
    before = sample.messages[:turn]

    def rendered(fresh: bool) -> str | None:
        text = _try(sample, before, tokenizer, fresh) if before else None
        return text[len(known) :] if text is not None and text.startswith(known) else None

    through, opened = through[len(known) :], rendered(fresh=True)
    if opened is not None and through.startswith(opened) and whole.startswith(opened):
        return len(opened)
    closed = rendered(fresh=False)
    if closed is not None and through.startswith(closed) and whole.startswith(closed):
        # A fresh answer is opened with something that this turn lacks, such as a thought's mark.
        return max(len(closed), _in_common(opened or "", through, whole))
    # Nothing comes before, or not as it stands here: the nearest opening before what is said.
    said = _said(sample, turn, tokenizer)
    place = through.rfind(said) if said else len(through)
    opening = _opening(sample, tokenizer)
    opened_at = through.rfind(opening, 0, max(place, 0)) if opening else -1
    if opened_at >= 0:
        return opened_at + len(opening)
    return place if said and place >= 0 else None


def _in_common(*texts: str) -> int:
    """How many characters the texts begin with alike, without a mark that is alike in part."""
    columns = enumerate(zip(*texts, strict=False))
    shared = next((at for at, its in columns if len(set(its)) > 1), min(map(len, texts)))
    inside = texts[0].rfind("<", 0, shared)
    return shared if inside <= texts[0].rfind(">", 0, shared) else inside


def _opening(sample: Sample, tokenizer: Any) -> str:
    """What the template writes where an answer is to begin."""
    asked = [{"role": "user", "content": "?"}]
    closed, opened = (_try(sample, asked, tokenizer, its) for its in (False, True))
    if closed is None or opened is None or not opened.startswith(closed):
        return ""
    return opened[len(closed) :]


def _said(sample: Sample, turn: int, tokenizer: Any) -> str:
    return _as_known(sample.messages[turn], tokenizer)["content"].strip()


def _as_known(message: Message, tokenizer: Any) -> Message:
    return message if template_names(tokenizer, "tool_calls") else calls_as_text(message)


def _try(
    sample: Sample, messages: Any, tokenizer: Any, add_generation_prompt: bool = False
) -> str | None:
    """The part of a chat as text, or None where the template refuses it by itself."""
    try:
        return _render(sample, messages, tokenizer, add_generation_prompt)
    except DataError:
        return None


def _render(
    sample: Sample, messages: Any, tokenizer: Any, add_generation_prompt: bool = False
) -> str:
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{sample.place} is a chat, but the tokenizer has no chat template. Use a chat model, "
            f"name a Jinja file in data.chat_template, or bring the data into prompt-completion "
            f"form."
        )
    messages = [_as_known(its, tokenizer) for its in messages]
    if not template_names(tokenizer, "developer"):
        messages = [
            its | {"role": "system"} if its["role"] == "developer" else its for its in messages
        ]
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=list(sample.tools) if sample.tools else None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **(sample.template_options or {}),
        )
    except Exception as error:  # a template raises whatever its author wrote
        raise DataError(f"{sample.place}: the chat template refuses the chat: {error}") from error
