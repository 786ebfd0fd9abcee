"""Chats to text by the tokenizer's template, and which characters of it the assistant said."""

from __future__ import annotations

from typing import Any

from .data_chat import calls_as_text
from .data_files import DataError
from .data_sft import Sample

Span = tuple[int, int]


def render_chat(sample: Sample, tokenizer: Any, add_generation_prompt: bool = False) -> str:
    """Return the chat as text; with the opening of an answer where one is to be generated."""
    return _render(sample, sample.messages, tokenizer, add_generation_prompt)


def template_names(tokenizer: Any, name: str) -> bool:
    """Whether the chat template has a place for something, such as `tools` or `tool_calls`."""
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return any(name in text for text in texts)


def chat_spans(sample: Sample, tokenizer: Any) -> tuple[str, list[Span]]:
    """Return a rendered chat and what of it the loss counts: the assistant's turns and their ends.

    Where a turn begins and ends is found by rendering the chat up to it. A template that renders
    earlier turns differently once later ones follow (some drop their reasoning) breaks this for
    those turns; then only the last one is learnt, which is what such a model sees in use.
    """
    whole = render_chat(sample, tokenizer)
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
    return whole, learnt


def _span(sample: Sample, turn: int, whole: str, tokenizer: Any) -> Span | None:
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
    if not template_names(tokenizer, "tool_calls"):
        messages = map(calls_as_text, messages)
    if not template_names(tokenizer, "developer"):
        messages = [
            its | {"role": "system"} if its["role"] == "developer" else its for its in messages
        ]
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tools=list(sample.tools) if sample.tools else None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template raises whatever its author wrote
        raise DataError(f"{sample.place}: the chat template refuses the chat: {error}") from error
