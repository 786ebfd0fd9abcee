"""Which turns of a chat the loss counts, with templates that treat them in their own ways."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from msplora.train.data_check import DataCheck
from msplora.train.data_files import DataError, Row
from msplora.train.data_preference import Pair
from msplora.train.data_report import data_report
from msplora.train.data_sft import Sample, SftData, SourceOfSamples, samples
from msplora.train.lengths import LengthReport, Limit
from msplora.train.settings_file import make_settings
from msplora.train.sft_rows import masked_sample, prepare_rows
from msplora.train.tokenise_preference import tokenise_pairs
from msplora.train.tokenise_sft import prompt_ids, tokenise_samples
from runs import write_jsonl
from tiny_saved import byte_tokenizer, save_language_model

UNBOUNDED = Limit(None, None, "truncate")

# Puts a system prompt of its own before chats that have none, as Qwen2.5's does.
WITH_SYSTEM = (
    "{% if messages[0].role != 'system' %}<sys>You are helpful.</s>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# Shows thoughts, be they empty, in the last turn alone, as Qwen3's does.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

# Closes the last turn with another token than the turns before it, as gpt-oss's does.
RETURNING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{{ '<return>' if m.role == 'assistant' and loop.last else '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# Opens a fresh answer with more than an answer that stands there, as DeepSeek-R1's does.
OPENING = WITH_SYSTEM.replace("%}<assistant>", "%}<assistant><think>")

# Refuses chats without a user.
NEEDS_USER = (
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ raise_exception('no user') }}{% endif %}" + WITH_SYSTEM
)


# Opens an answer with an empty thought where a row asks for none, as Qwen3's does.
SWITCHED = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)


def chat(*turns: str, **more: Any) -> Sample:
    """Turns as `u: text`, `a: text` or `s: text`."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    messages = [{"role": roles[turn[0]], "content": turn[3:]} for turn in turns]
    messages[-1] |= more
    (sample,) = samples([Row("row 1", {"messages": messages})], "messages", {})
    return sample


def counted(template: str, *chats: Sample) -> tuple[list[str], LengthReport]:
    """The rows with ▶ and ◀ around what the loss counts, and the report."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    rows, report = tokenise_samples(list(chats), tokenizer, UNBOUNDED, "training")
    return [masked_sample(row, tokenizer).plain for row in rows], report


def checked(template: str, *chats: Sample) -> DataCheck:
    """What is found in training rows of the chats."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    settings = make_settings(
        {"model": "m", "task": "sft", "output": "o", "data": {"train": "rows.jsonl"}}, "x.yaml"
    )
    data = SftData([SourceOfSamples("rows.jsonl", "messages", 1.0, len(chats), 0)], [*chats], [])
    return prepare_rows(settings, data, tokenizer, UNBOUNDED, []).check


GREETED = chat("a: Hello", "u: Hi", "a: Yes?")


@pytest.mark.parametrize(
    ("template", "asked", "shown"),
    [
        (
            WITH_SYSTEM,
            GREETED,
            "<sys>You are helpful.</s><assistant>▶Hello</s>◀<user>Hi</s><assistant>▶Yes?</s>◀",
        ),
        (
            OPENING,
            chat("a: Hello", "u: Hi"),
            "<sys>You are helpful.</s><assistant>▶Hello</s>◀<user>Hi</s>",
        ),
        (THINKING, chat("a: Hello", "u: Hi"), "<assistant>▶Hello</s>◀<user>Hi</s>"),
    ],
)
def test_a_chat_that_begins_with_the_assistant_learns_what_it_said_alone(
    template: str, asked: Sample, shown: str
) -> None:
    (row,), report = counted(template, asked)
    assert row == shown
    assert report.unlearnt_turns == 0


def test_a_first_turn_that_the_template_refuses_alone_is_left_unlearnt_and_counted() -> None:
    for start in ("a: Hello", "s: Be brief"):
        chats = chat(start, "a: Hello", "u: Hi", "a: Yes?")
        (row,), report = counted(NEEDS_USER, chats)
        assert row.endswith("</s><user>Hi</s><assistant>▶Yes?</s>◀")
        assert row.count("▶") == 1
        assert report.unlearnt_turns == 1 + (start[0] == "a")
    assert report.turns == 2


def test_an_empty_turn_that_is_not_found_is_not_said_to_be_lost() -> None:
    closed_once = (  # the end token stands behind the whole chat, as with Phi-3's
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% else %}</s>{% endif %}"
    )
    asked = chat("u: 1", "a: ", "u: 2", "a: Two")
    (row,), report = counted(closed_once, asked)
    assert row == "<user>1<end><assistant><end><user>2<end><assistant>▶Two<end></s>◀"
    assert (report.turns, report.unlearnt_turns) == (1, 0)
    check = checked(closed_once, asked)
    assert check.empty == {"an empty turn of the assistant": 1}
    assert not any("are not learnt" in its for its in check.warnings)


def test_earlier_turns_are_learnt_as_they_stand_in_the_chat() -> None:
    asked = chat("u: 1", "a: One", "u: 2", "a: Two", "u: 3", "a: Three")
    (row,), report = counted(THINKING, asked)
    assert row == (
        "<user>1</s><assistant>▶One</s>◀<user>2</s><assistant>▶Two</s>◀"
        "<user>3</s><assistant>▶<think></think>Three</s>◀"
    )
    assert (report.turns, report.unlearnt_turns) == (3, 0)
    (row,), report = counted(RETURNING, asked)  # a model does not stop at <end>
    assert row == (
        "<user>1<end><assistant>▶One◀<end><user>2<end><assistant>▶Two◀<end>"
        "<user>3<end><assistant>▶Three<return>◀"
    )
    assert report.unlearnt_turns == 0


def test_a_turn_that_loses_its_thoughts_is_not_learnt_and_counted() -> None:
    turns = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "One", "reasoning_content": "Hm"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "Two", "reasoning_content": "Hum"},
    ]
    (asked,) = samples([Row("row 1", {"messages": turns})], "messages", {})
    (row,), report = counted(THINKING, asked)
    assert row == "<user>1</s><assistant>One</s><user>2</s><assistant>▶<think>Hum</think>Two</s>◀"
    assert (report.turns, report.unlearnt_turns) == (2, 1)


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        (WITH_SYSTEM, 2),  # which names no thoughts of their own
        (WITH_SYSTEM.replace("m.content", "m.content.split('</think>')[-1]"), 4),
        (WITH_SYSTEM.replace("m.content", "m.content if m.content is not string"), 6),
        (THINKING, 0),
    ],
    ids=["without-a-place", "cut-off", "parts-alone", "kept"],
)
def test_words_that_a_template_never_renders_are_counted_and_warned_of(
    template: str, lost: int
) -> None:
    said = [
        {"content": "One", "reasoning_content": "Hm, so"},
        {"content": "<think>Well,\n then</think>\n\nTwo"},
        {"content": " Three <b>of</b> them"},
    ]
    asked = {"role": "user", "content": "?"}
    rows = [[asked, {"role": "assistant", **its}] for its in said * 2]
    chats = samples([Row("r", {"messages": its}) for its in rows], "messages", {})
    _, report = counted(template, *chats)
    assert (report.turns, report.unlearnt_turns, report.shortened_turns) == (6, 0, lost)
    warnings = checked(template, *chats).warnings
    said_of = [its for its in warnings if "are learnt without words of theirs" in its]
    assert [its.split(" ")[:3] for its in said_of] == [[str(lost), "of", "6"]] * bool(lost)


def test_the_mark_that_opens_a_turn_is_not_learnt_where_a_fresh_one_is_opened_otherwise() -> None:
    (row,), _ = counted(OPENING, chat("u: 1", "a: One", "u: 2", "a: <b>Two"))
    assert row.endswith("<user>1</s><assistant>▶One</s>◀<user>2</s><assistant>▶<b>Two</s>◀")


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (None, "▶<think></think>Two</s>◀"),
        ({}, "▶<think></think>Two</s>◀"),
        ({"enable_thinking": True}, "▶<think></think>Two</s>◀"),
        ({"enable_thinking": None}, "▶<think></think>Two</s>◀"),  # a table's null
        ({"enable_thinking": False}, "<think></think>▶Two</s>◀"),
        ('{"enable_thinking": false}', "<think></think>▶Two</s>◀"),  # of a CSV
    ],
)
def test_a_row_s_options_reach_the_template(options: Any, shown: str) -> None:
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "1"), ("assistant", "One"), ("user", "2"), ("assistant", "Two"))
    ]
    row = Row("row 1", {"messages": turns, "chat_template_kwargs": options})
    (asked,) = samples([row], "messages", {})
    (found,), _ = counted(SWITCHED, asked)
    assert found == f"<user>1</s><assistant>▶One</s>◀<user>2</s><assistant>{shown}"
    (asked,) = samples([row], "messages", {}, unanswered=True)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = SWITCHED
    opened = tokenizer.decode(prompt_ids(asked, tokenizer))
    assert (
        opened.removeprefix("<user>1</s><assistant>One</s><user>2</s><assistant>")
        == (shown.partition("▶")[0])
    )


def test_options_that_the_template_does_not_name_are_warned_of() -> None:
    asked = chat("u: 1", "a: One")
    for name, warned in (("enable_thinking", 0), ("thinking_budget", 1), ("enable", 1)):
        told = replace(asked, template_options={name: False})
        warnings = checked(SWITCHED, told).warnings
        said = [its for its in warnings if "1 of 1 (100.0 %) rows set" in its]
        assert len(said) == warned
        assert all(f"set {name} in chat_template_kwargs" in its for its in said)


def test_turns_that_are_not_learnt_are_said_before_training(tmp_path: Path) -> None:
    model = save_language_model(tmp_path / "base")
    (tmp_path / "chat.jinja").write_text(NEEDS_USER)
    turns = [{"role": role, "content": text} for role, text in (("assistant", "A"), ("user", "B"))]
    rows = [{"messages": [*turns, {"role": "assistant", "content": str(its)}]} for its in range(4)]
    content = {
        "model": str(model),
        "task": "sft",
        "output": str(tmp_path / "run"),
        "data": {
            "train": str(write_jsonl(tmp_path / "rows.jsonl", rows)),
            "validation_fraction": 0,
            "chat_template": str(tmp_path / "chat.jinja"),
        },
    }
    check = data_report(make_settings(content, "x.yaml")).check
    assert (check.training.turns, check.training.unlearnt_turns) == (8, 4)
    assert any("4 of 8 (50.0 %) turns of the assistant" in its for its in check.warnings)


def test_an_answer_to_prefer_that_cannot_be_found_is_refused() -> None:
    tokenizer = byte_tokenizer()
    # No mark opens an answer, and what comes before it depends on it.
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.revindex == 2 and messages[-1].tool_calls %}!{% endif %}"
        "<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    )
    call = {"name": "f", "arguments": {}}
    asked = chat("u: 1", "a: One", "u: 2", "a: ", tool_calls=[call])
    with pytest.raises(DataError, match="row 1: where the answer begins cannot be found"):
        tokenise_pairs([Pair(asked, asked)], tokenizer, UNBOUNDED, "training")


def test_a_turn_after_one_that_had_an_empty_thought_is_learnt_too() -> None:
    """Qwen3.5's template shows the thoughts of all that follows the last question."""
    template = (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index %}{% endif %}{% endfor %}{% for m in messages %}<{{ m.role }}>"
        "{% if m.role == 'assistant' and loop.index > ns.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}{% if m.tool_calls %}<call>{{ m.tool_calls[0].function.name }}{% endif %}"
        "</s>{% endfor %}{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
    )
    turns = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "One"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "Two"},
    ]
    (asked,) = samples([Row("row 1", {"messages": turns})], "messages", {})
    (row,), report = counted(template, asked)
    assert row == (
        "<user>1</s><assistant>▶<call>f</s>◀<tool>3</s><assistant>▶One</s>◀"
        "<user>2</s><assistant><think>\n▶\n</think>\n\nTwo</s>◀"
    )
    assert report.unlearnt_turns == 0
