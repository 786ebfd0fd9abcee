"""Chats with tools, in the words of every data set, and alpaca rows with what came before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import transformers as hf
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers

from msplora.train.data_chat import read_chat
from msplora.train.data_files import DataError, Row, read_rows
from msplora.train.data_forms import detect_form
from msplora.train.data_sft import Sample, alpaca_prompt, samples
from msplora.train.lengths import Limit
from msplora.train.sft_rows import masked_sample
from msplora.train.tokenise_sft import tokenise_samples

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
ARGUMENTS = json.dumps(CALL["function"]["arguments"])
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TURNS = (
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
)
ASKED = {"role": "user", "content": "1 + 2?"}
ANSWERED = {"role": "assistant", "content": "It is 3."}
TEMPLATE = (
    "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def tokenizer(template: str) -> Any:
    """Of bytes, so that every text comes out as it went in."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({symbol: place for place, symbol in enumerate(alphabet)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    from tokenizers.decoders import ByteLevel

    found.decoder = ByteLevel()  # pyright: ignore
    wrapped = hf.PreTrainedTokenizerFast(tokenizer_object=found)
    wrapped.chat_template = template
    return wrapped


def chat(turns: list[Any], **values: Any) -> Sample:
    rows = [Row("row 1", {"messages": turns, **values})]
    assert detect_form(rows, {}) == "messages"
    (sample,) = samples(rows, "messages", {})
    return sample


@pytest.mark.parametrize(
    "turns",
    [
        list(TURNS),
        [  # as LLaMA-Factory's files have it
            {"from": "human", "value": "1 + 2?"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "It is 3."},
        ],
        [  # as OpenAI's have it: no content, and arguments as text
            ASKED,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}
                ],
            },
            {"role": "tool", "content": [{"type": "text", "text": "3"}]},
            ANSWERED,
        ],
        [  # as OpenAI's had it once
            ASKED,
            {"role": "assistant", "function_call": {"name": "add", "arguments": ARGUMENTS}},
            {"role": "function", "content": "3"},
            ANSWERED,
        ],
        [  # several calls in one text, and calls outside of `function`
            ASKED,
            {"role": "tool_call", "content": json.dumps([CALL["function"]])},
            {"role": "tool_response", "content": "3"},
            ANSWERED,
        ],
        [  # arguments as text within a text
            {"from": "human", "value": "1 + 2?"},
            {"from": "function_call", "value": json.dumps({"name": "add", "arguments": ARGUMENTS})},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "It is 3."},
        ],
        json.dumps(TURNS),
    ],
)
def test_a_call_is_a_call_in_the_words_of_every_data_set(turns: Any) -> None:
    assert read_chat(Row("x", {"messages": turns}), unanswered=False) == (TURNS, None)


def test_tables_with_nulls_for_what_a_turn_lacks(tmp_path: Path) -> None:
    """A column of parquet gives every turn the fields of all turns, and every tool likewise."""
    tools = [TOOL["function"], {"name": "say", "parameters": None}]
    rows = [{"messages": list(TURNS), "tools": tools}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (row,) = read_rows(tmp_path / "a.parquet")
    assert row["messages"][0]["tool_calls"] is None
    messages, found = read_chat(row, unanswered=False)
    assert messages == TURNS
    assert found == (TOOL, {"type": "function", "function": {"name": "say"}})


def test_ids_names_and_thoughts_are_kept() -> None:
    call = {"id": "call_1", **CALL}
    turns = [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "call_1", "name": "add"},
        {"role": "assistant", "content": "It is 3.", "reasoning_content": "Easy."},
    ]
    assert list(read_chat(Row("x", {"messages": turns}), False)[0]) == turns


def test_a_call_that_is_no_json_stays_what_it_says() -> None:
    turns = [ASKED, {"from": "function_call", "value": "add(1, 2)"}]
    messages, _ = read_chat(Row("x", {"messages": turns}), False)
    assert messages[1] == {"role": "assistant", "content": "add(1, 2)"}


def test_the_loss_counts_calls_and_not_what_tools_say() -> None:
    sample = chat(list(TURNS), tools=json.dumps([TOOL["function"]]))
    known = tokenizer(TEMPLATE)
    (row,), _ = tokenise_samples([sample], known, Limit(None, None, "truncate"), "training")
    assert masked_sample(row, known).plain == (
        '<add>u:1 + 2?;a:▶add{"a": 1, "b": 2};◀t:3;a:▶It is 3.;◀'
    )


def test_a_template_that_knows_no_calls_gets_them_as_text() -> None:
    plain = tokenizer(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    (row,), _ = tokenise_samples(
        [chat(list(TURNS))], plain, Limit(None, None, "truncate"), "training"
    )
    assert masked_sample(row, plain).plain == (
        'u:1 + 2?;a:▶{"name": "add", "arguments": {"a": 1, "b": 2}};◀t:3;a:▶It is 3.;◀'
    )


def shown(sample: Sample) -> str:
    known = tokenizer(TEMPLATE)
    (row,), report = tokenise_samples([sample], known, Limit(None, None, "truncate"), "training")
    assert report.unlearnt_turns == 0
    return masked_sample(row, known).plain


def test_a_turn_of_weight_0_is_read_and_not_learnt() -> None:
    answers = [ANSWERED | {"weight": weight} for weight in (0, 1, None)]
    turns = [its for answer in answers for its in (ASKED, answer)]
    assert shown(chat(turns)) == (
        "u:1 + 2?;a:It is 3.;u:1 + 2?;a:▶It is 3.;◀u:1 + 2?;a:▶It is 3.;◀"
    )


@pytest.mark.parametrize("name", ["train", "training"])
def test_a_turn_that_axolotl_s_flag_takes_out_is_read_and_not_learnt(name: str) -> None:
    answers = [
        ANSWERED | {name: False},
        ANSWERED | {name: True, "weight": 1},
        ANSWERED | {name: None},
        ANSWERED | {name: False, "weight": 0},
    ]
    turns = [its for answer in answers for its in (ASKED | {name: False}, answer)]
    assert shown(chat(turns)) == (
        "u:1 + 2?;a:It is 3.;u:1 + 2?;a:▶It is 3.;◀u:1 + 2?;a:▶It is 3.;◀u:1 + 2?;a:It is 3.;"
    )


def test_of_a_chat_in_two_parts_only_the_completion_is_learnt() -> None:
    prompt = [ASKED, ANSWERED | {"train": True}, ASKED]
    row = Row("row 1", {"prompt": prompt, "completion": [ANSWERED]})
    assert detect_form([row], {}) == "messages"
    (sample,) = samples([row], "messages", {})
    assert shown(sample) == "u:1 + 2?;a:It is 3.;u:1 + 2?;a:▶It is 3.;◀"
    asked = Row("row 1", {"prompt": [ASKED]})
    assert detect_form([asked], {}, unanswered=True) == "messages"
    assert samples([asked], "messages", {}, unanswered=True)[0].messages == (ASKED,)


def test_a_chat_without_a_prompt_has_nothing_to_answer() -> None:
    row = Row("row 1", {"messages": [ANSWERED, ANSWERED]})
    with pytest.raises(DataError, match=r"row 1: nothing but the assistant's answer"):
        samples([row], "messages", {}, unanswered=True)


@pytest.mark.parametrize(
    ("turns", "values", "said"),
    [
        ([ASKED, ANSWERED | {"weight": 0}], {}, "or only such of weight 0 or train false, so"),
        ([ASKED, ANSWERED | {"train": False}], {}, "or only such of weight 0 or train false, so"),
        ([ASKED, ANSWERED | {"train": "no"}], {}, "turn 2: 'train' of a turn is true or false"),
        ([ASKED, ANSWERED | {"training": 0}], {}, "'training' of a turn is true or false; found 0"),
        (
            [ASKED, ANSWERED | {"train": False, "weight": 1}],
            {},
            "turn 2: train: false and weight: 1 contradict each other",
        ),
        ([ASKED, ANSWERED | {"train": True, "training": False}], {}, "contradict each other"),
        ([ASKED | {"train": True}, ANSWERED], {}, "turn 1: 'train' asks for a turn of the user"),
        ([ASKED, ANSWERED | {"train_detail": [{}]}], {}, "'train_detail' asks for parts of a turn"),
        (
            [{"speaker": "A", "text": "Hello"}, ANSWERED],
            {},
            "turn 1: a turn has role and content (or from and value); found speaker, text.",
        ),
        ([ASKED, {"role": "assistant", "text": "A"}], {}, "(or from and value); found role, text."),
        ([{}, ANSWERED], {}, "(or from and value); found nothing."),
        ([ASKED, {"role": "assistant", "content": None}], {}, "turn 2: the content is null"),
        ([ASKED | {"role": ["user"]}, ANSWERED], {}, "role ['user'] is none of"),
        ([], {}, "'messages' (or 'conversations') must be a list of turns"),
        (None, {}, "'messages' (or 'conversations') must be a list of turns"),
        ([ASKED, ANSWERED | {"weight": 0.5}], {}, "turn 2: a weight of a turn is 0 or 1"),
        (
            [
                ASKED,
                {"from": "function_call", "value": json.dumps({"name": "f", "arguments": "{"})},
            ],
            {},
            "turn 2: the arguments of a call is not valid JSON",
        ),
        ("{", {}, "'messages' is not valid JSON"),
        (
            [ASKED, {"role": "assistant", "tool_calls": "["}],
            {},
            "turn 2: 'tool_calls' is not valid",
        ),
        ([ASKED, {"role": "assistant", "tool_calls": {"a": 1}}], {}, "'tool_calls' is a dict"),
        ([ASKED, {"role": "assistant", "tool_calls": [{"id": "x"}]}], {}, "the name of a function"),
        (
            [ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}],
            {},
            "turn 2: the arguments of a call is not valid JSON",
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], {}, "turn 1: the content has parts"),
        ([ASKED, ANSWERED], {"tools": "{"}, "'tools' is not valid JSON"),
        ([ASKED, ANSWERED], {"tools": ["add"]}, "'tools' is not a list of objects"),
    ],
)
def test_chats_that_cannot_be_read(turns: Any, values: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        read_chat(Row("a.jsonl, line 3", {"messages": turns, **values}), False)
    assert said in str(caught.value)
    assert "a.jsonl, line 3" in str(caught.value)


def test_rows_of_a_table_that_has_both_names_of_a_chat() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    filled = {"messages": turns, "conversations": None}, {"messages": None, "conversations": turns}
    rows = [Row(f"row {place}", its) for place, its in enumerate(filled)]
    assert detect_form(rows, {}) == "messages"
    first, second = samples(rows, "messages", {})
    assert first.messages == second.messages == tuple(turns)


def test_nulls_that_a_table_puts_under_the_other_names_of_role_and_text() -> None:
    turns = [{"role": None, "content": None, "from": "gpt", "value": "It is 3."}]
    assert read_chat(Row("x", {"messages": turns}), False)[0] == (ANSWERED,)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("{", "'chat_template_kwargs' is not valid JSON"),
        (["enable_thinking"], "'chat_template_kwargs' is a list, not an object"),
        ({"tokenize": True, "tools": []}, "'chat_template_kwargs' sets tokenize, tools, which"),
    ],
)
def test_options_of_the_template_that_cannot_be(options: Any, said: str) -> None:
    with pytest.raises(DataError, match=f"^row 1: {said}"):
        chat([ASKED, ANSWERED], chat_template_kwargs=options)


# Alpaca with what came before.


def test_alpaca_s_system_and_history_come_before_the_instruction() -> None:
    values = {
        "instruction": "And 3?",
        "output": "4",
        "system": "Be brief.",
        "history": [["1 + 1?", "2"], ["And 2?", "3"]],
    }
    (sample,) = samples([Row("x", values)], "alpaca", {})
    assert sample.completion == "4"
    assert sample.prompt == (
        "Be brief.\n\n### Instruction:\n1 + 1?\n\n### Response:\n2\n\n"
        "### Instruction:\nAnd 2?\n\n### Response:\n3\n\n" + alpaca_prompt("And 3?")
    )
    (from_csv,) = samples(
        [Row("x", values | {"history": json.dumps(values["history"])})], "alpaca", {}
    )
    assert from_csv == sample
    for nothing in (
        {},
        {"system": "", "history": []},
        {"system": None, "history": None},
        {"system": "", "history": ""},
        {"system": "", "history": "[]"},
    ):
        row = Row("x", {"instruction": "i", "output": "o", **nothing})
        (sample,) = samples([row], "alpaca", {})
        assert sample.prompt == alpaca_prompt("i")


@pytest.mark.parametrize("history", [["a"], [["a"]], [["a", 1]], {"a": "b"}, "5", '["a"]'])
def test_a_history_of_no_pairs_is_refused(history: Any) -> None:
    row = Row("a.json, row 2", {"instruction": "i", "output": "o", "history": history})
    with pytest.raises(DataError, match=r"a\.json, row 2: 'history' is a list of pairs"):
        samples([row], "alpaca", {})


def test_a_null_in_a_text_of_json_was_meant() -> None:
    """Tables put nulls into objects alone."""
    arguments = {"city": "Paris", "unit": None}

    def called(arguments: Any) -> Any:
        calls = [{"function": {"name": "f", "arguments": arguments}}]
        turns = [ASKED, {"role": "assistant", "content": None, "tool_calls": calls}]
        (_, turn), _ = read_chat(Row("x", {"messages": turns}), False)
        return turn["tool_calls"][0]["function"]["arguments"]

    assert called(json.dumps(arguments)) == arguments
    assert called(arguments) == {"city": "Paris"}
    text = json.dumps({"name": "f", "arguments": arguments})
    turns = [ASKED, {"from": "function_call", "value": text}]
    (_, turn), _ = read_chat(Row("x", {"messages": turns}), False)
    assert turn["tool_calls"][0]["function"]["arguments"] == arguments
