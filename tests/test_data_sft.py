"""Samples of every form, and which of their tokens the loss counts: token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from msplora.errors import ConfigError
from msplora.train.data_files import DataError, Row
from msplora.train.data_forms import Form, detect_form
from msplora.train.data_sft import (
    Sample,
    alpaca_prompt,
    read_more_sft,
    read_sft,
    samples,
)
from msplora.train.lengths import Limit
from msplora.train.prediction import predict_file
from msplora.train.settings_data import DataSettings
from msplora.train.sft import masked_sample
from msplora.train.tokenise_sft import IGNORED, prompt_ids, tokenise_samples
from runs import WORDS, word_tokenizer, write_jsonl

CHAT = (
    "{{ bos_token }}{% for m in messages %} [{{ m['role'] }}] {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} [assistant]{% endif %}"
)
UNBOUNDED = Limit(None, None, "truncate")


def tokenizer_of(opening: str = "<s>", closing: str = "", template: str | None = CHAT) -> Any:
    roles = ("[system]", "[user]", "[assistant]", "[tool]")
    found = hf.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(
            "<unk>", "<s>", "</s>", *roles, opening=opening, closing=closing
        ),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    found.chat_template = template
    return found


def row(**values: Any) -> Row:
    return Row("row 1", values)


def learnt(
    sample: Sample, tokenizer: Any, limit: Limit = UNBOUNDED, completion_only: bool = True
) -> list[str]:
    """The tokens of a row; those that the loss counts in capitals."""
    (tokens,), _ = tokenise_samples([sample], tokenizer, limit, "training", completion_only)
    for its, label in zip(tokens.input_ids, tokens.labels, strict=True):
        assert label in (its, IGNORED)
    return [
        word if label == IGNORED else word.upper()
        for word, label in zip(
            tokenizer.convert_ids_to_tokens(tokens.input_ids), tokens.labels, strict=True
        )
    ]


# Forms.


@pytest.mark.parametrize(
    ("values", "form", "sample"),
    [
        ({"text": "t"}, "text", Sample("row 1", "", "t")),
        ({"prompt": "p", "completion": "c"}, "prompt-completion", Sample("row 1", "p", "c")),
        (
            {"system": "s", "prompt": "p", "completion": "c"},
            "prompt-completion",
            Sample("row 1", "s\n\np", "c"),
        ),
        (
            {"instruction": "i", "input": "x", "output": "o"},
            "alpaca",
            Sample("row 1", "### Instruction:\ni\n\n### Input:\nx\n\n### Response:\n", "o"),
        ),
        (
            {"instruction": "i", "output": "o"},
            "alpaca",
            Sample("row 1", "### Instruction:\ni\n\n### Response:\n", "o"),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "u"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            "messages",
            Sample(
                "row 1",
                messages=(
                    {"role": "user", "content": "u"},
                    {"role": "assistant", "content": "a"},
                ),
            ),
        ),
        (
            {
                "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}],
                "system": "s",
            },
            "messages",
            Sample(
                "row 1",
                messages=(
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "u"},
                    {"role": "assistant", "content": "a"},
                ),
            ),
        ),
    ],
)
def test_forms_are_detected(values: dict[str, Any], form: Any, sample: Sample) -> None:
    rows = [Row("row 1", values)]
    assert detect_form(rows, {}) == form
    assert samples(rows, form, {}) == [sample]


def test_columns_of_other_names_are_named() -> None:
    rows = [row(question="q", answer="a")]
    columns = {"prompt": "question", "completion": "answer"}
    assert detect_form(rows, columns) == "prompt-completion"
    assert samples(rows, "prompt-completion", columns) == [Sample("row 1", "q", "a")]
    # Rows to be answered have no answer.
    asked = samples([row(question="q")], "prompt-completion", columns, unanswered=True)
    assert asked == [Sample("row 1", "q")]
    with pytest.raises(DataError, match=r"no column 'questoin' \(data.columns.prompt\)"):
        detect_form(rows, {"prompt": "questoin"})


def test_columns_may_change_places_in_any_order() -> None:
    asked = row(instruction="i", input="x", output="o", context="c")
    expected = Sample("row 1", alpaca_prompt("i", "c", "x"), "o")
    for columns in (
        {"system": "input", "input": "context"},
        {"input": "context", "system": "input"},
    ):
        assert samples([asked], "alpaca", columns) == [expected]
    swapped = samples([asked], "alpaca", {"instruction": "output", "output": "instruction"})
    assert swapped == [Sample("row 1", alpaca_prompt("o", "x"), "i")]


def test_rows_without_anything_to_learn_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": c} for c in ("a", "", "b", "  ", "c", "d")]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    found = read_sft(DataSettings(train=str(file), validation_fraction=0.0), 0)
    assert [sample.completion for sample in found.train] == ["a", "b", "c", "d"]
    assert found.left_out == 2
    write_jsonl(file, rows[1:2] * 3)
    with pytest.raises(DataError, match="empty completion"):
        read_sft(DataSettings(train=str(file)), 0)


def test_held_out_rows_of_which_none_judges_are_refused(tmp_path: Path) -> None:
    train = str(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}] * 4))
    asked = str(write_jsonl(tmp_path / "b.jsonl", [{"prompt": "p", "completion": " "}] * 4))
    with pytest.raises(DataError) as caught:
        read_sft(DataSettings(train=train, validation=asked), 0)
    assert str(caught.value) == (
        f"{asked}, line 1 and all other held-out rows have an empty completion. To judge the run, "
        f"name other rows in data.validation; to do without, leave that out and set "
        f"data.validation_fraction: 0."
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"promt": "a", "completion": "b"}], "Did you mean 'prompt'?"),
        ([{"text": "a"}, {"prompt": "a", "completion": "b"}], "mixed forms"),
        (
            [{"prompt": ["a"], "completion": "b"}],
            "a list, not text. Chat turns go under 'messages'",
        ),
        (
            [{"prompt": "a", "completion": 5}],
            "'completion' holds a int, not text. Write it as text",
        ),
        ([{"instruction": "a", "output": "b", "input": 3}], "'input' holds a int"),
        ([{"messages": []}], "at least one"),
        ([{"messages": ["hello"]}], "turn 1: found a str"),
        ([{"messages": [{"role": "asistant", "content": "a"}]}], "Did you mean 'assistant'?"),
        ([{"messages": [{"role": "assistant", "content": None}]}], "content is null, not text"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "no turn of the assistant"),
    ],
)
def test_rows_of_no_form(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", rows * 2)
    with pytest.raises(DataError) as caught:
        read_sft(DataSettings(train=str(file), validation_fraction=0.0), 0)
    assert said in str(caught.value)
    assert f"{file}, line " in str(caught.value)


def test_a_text_file_holds_out_its_end(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("".join(f"line {place}\n" for place in range(100)))
    found = read_sft(DataSettings(train=str(file), validation_fraction=0.2), 0)
    first, last = found.train[0].completion, found.held_out[0].completion
    assert first + last == file.read_text()
    assert first.endswith("\n")
    assert 0.15 < len(last) / len(first + last) < 0.25
    whole = read_sft(DataSettings(train=str(file), validation_fraction=0.0), 0)
    assert (whole.train[0].completion, whole.held_out) == (file.read_text(), [])


@pytest.mark.parametrize(
    "text",
    ["Title\n" + "words " * 500, "Title\n" + "x" * 500, "a line of words\n" * 2, "\n" + "x" * 99],
)
def test_a_text_of_long_lines_is_trained_on_none_the_less(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    data = DataSettings(train=str(tmp_path / "a.txt"), validation_fraction=0.2)
    found = read_sft(data, 0)
    first, last = found.train[0].completion, found.held_out[0].completion
    assert first + last == text
    assert 0.2 <= len(last) / len(text) <= 0.3 + 1 / len(text)


def test_another_file_is_of_one_of_the_run_s_forms(tmp_path: Path) -> None:
    asked = str(write_jsonl(tmp_path / "asked.jsonl", [{"prompt": "p"}]))
    both = str(write_jsonl(tmp_path / "both.jsonl", [{"text": "t", "prompt": "p"}]))
    (tmp_path / "a.txt").write_text("words")
    whole, data = str(tmp_path / "a.txt"), DataSettings()

    def read(file: str, *forms: Any, unanswered: bool = True) -> list[str]:
        return [
            its.prompt or its.completion for its in read_more_sft(file, forms, data, unanswered)[0]
        ]

    assert read(asked) == read(asked, "text", "prompt-completion") == ["p"]
    assert read(both, "prompt-completion", "text") == ["p"]
    assert read(both, "text", unanswered=False) == ["t"]
    with pytest.raises(DataError, match="plain text, which has no prompts to answer"):
        read(both, "text")
    assert read(whole) == read(whole, "text-file") == read(whole, "text", "text-file") == ["words"]
    for file, form, said in (
        (asked, "text", "no 'text'"),
        (asked, "prompt-completion", "no 'completion'"),
        (asked, "text-file", "give a .txt"),
        (whole, "text", "cannot read .txt"),
    ):
        with pytest.raises(DataError) as caught:
            read(file, form, unanswered=False)
        assert said in str(caught.value)


def test_another_file_may_be_called_like_any_source_of_the_run(tmp_path: Path) -> None:
    given = str(write_jsonl(tmp_path / "given.jsonl", [{"question": "q", "answer": "a"}]))
    columns = {"prompt": "question", "completion": "answer"}
    sources = [{"path": "x.jsonl"}, {"path": "y.jsonl", "columns": columns}]
    data = DataSettings.model_validate({"train": sources})
    known: tuple[tuple[Form, ...], ...] = ((), ("text", "prompt-completion"))
    for forms in known:
        for unanswered, answer in ((False, "a"), (True, "")):
            (sample,), _ = read_more_sft(given, forms, data, unanswered)
            assert (sample.prompt, sample.completion) == ("q", answer)
    with pytest.raises(DataError, match="fit no form"):
        read_more_sft(given, (), DataSettings(train="x.jsonl"))


def test_predict_says_what_to_do_with_a_text_that_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(DataError, match="use msplora generate --prompt"):
        next(predict_file(tmp_path / "run", tmp_path / "a.txt"))


# The mask, token by token.


def test_only_the_completion_and_the_end_are_learnt() -> None:
    sample = Sample("x", "w1 w2", " w3 w4")
    assert learnt(sample, tokenizer_of()) == ["<s>", "w1", "w2", "W3", "W4", "</S>"]
    assert learnt(sample, tokenizer_of(opening="")) == ["w1", "w2", "W3", "W4", "</S>"]
    everything = learnt(sample, tokenizer_of(), completion_only=False)
    assert everything == ["<S>", "W1", "W2", "W3", "W4", "</S>"]


def test_an_end_token_is_not_put_twice_nor_left_in_the_middle() -> None:
    """Some tokenizers close every text; the prompt's own end must not come between."""
    closing = tokenizer_of(closing="</s>")
    sample = Sample("x", "w1 w2", " w3")
    assert learnt(sample, closing) == ["<s>", "w1", "w2", "W3", "</S>"]
    assert closing.convert_ids_to_tokens(prompt_ids(sample, closing)) == ["<s>", "w1", "w2"]
    assert learnt(Sample("x", "w1", " w2 </s>"), tokenizer_of()) == ["<s>", "w1", "W2", "</S>"]


def test_text_is_learnt_whole() -> None:
    assert learnt(Sample("x", "", "w1 w2"), tokenizer_of()) == ["<S>", "W1", "W2", "</S>"]


def test_a_token_across_the_border_is_learnt() -> None:
    """The end of the prompt and the start of the answer may be one token, which is predicted."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "c": 4}
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>")),
        unk_token="<unk>",
    )
    assert learnt(Sample("x", "ca", "bc"), tokenizer) == ["c", "AB", "C"]


def test_alpaca_s_prompt_is_not_learnt() -> None:
    sample = Sample("x", alpaca_prompt("w1", "w2"), "w3")
    marks = learnt(sample, tokenizer_of())
    assert marks[-2:] == ["W3", "</S>"]
    assert not any(mark.isupper() for mark in marks[:-2])


def chat(*turns: tuple[str, str]) -> Sample:
    return Sample("x", messages=tuple({"role": role, "content": text} for role, text in turns))


def test_every_assistant_turn_and_its_end_is_learnt_and_nothing_else() -> None:
    sample = chat(
        ("system", "w0"),
        ("user", "w1"),
        ("assistant", "w2 w3"),
        ("user", "w4"),
        ("assistant", "w5"),
    )
    assert learnt(sample, tokenizer_of()) == [
        *("<s>", "[system]", "w0", "[user]", "w1", "[assistant]", "W2", "W3", "</S>"),
        *("[user]", "w4", "[assistant]", "W5", "</S>"),
    ]


def test_the_template_s_start_token_is_not_doubled() -> None:
    sample = chat(("user", "w1"), ("assistant", "w2"))
    tokenizer = tokenizer_of(opening="<s>")
    assert learnt(sample, tokenizer).count("<s>") == 1
    assert prompt_ids(chat(("user", "w1")), tokenizer) == tokenizer.convert_tokens_to_ids(
        ["<s>", "[user]", "w1", "[assistant]"]
    )


def test_a_turn_that_loses_words_later_is_not_learnt() -> None:
    template = CHAT.replace(
        "{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'].split()[0] }}"
    )
    sample = chat(
        *(("user", "w0"), ("assistant", "w1")),  # has no more than one word
        *(("user", "w1"), ("assistant", "w2 w3"), ("user", "w4"), ("assistant", "w5 w6")),
    )
    assert learnt(sample, tokenizer_of(template=template)) == [
        *("<s>", "[user]", "w0", "[assistant]", "W1", "</S>"),
        *("[user]", "w1", "[assistant]", "w2", "</s>"),
        *("[user]", "w4", "[assistant]", "W5", "W6", "</S>"),
    ]
    _, report = tokenise_samples([sample], tokenizer_of(template=template), UNBOUNDED, "training")
    assert (report.turns, report.unlearnt_turns) == (3, 1)


def test_spaces_alone_are_learnt_where_a_tokenizer_trims_their_span() -> None:
    """Byte-level tokenizers with trimmed offsets give a token of spaces an empty span."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: place for place, symbol in enumerate(alphabet)}
    vocabulary["ĠĠ"] = len(vocabulary)
    byte_level = Tokenizer(models.BPE(vocabulary, [("Ġ", "Ġ")]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    byte_level.post_processor = processors.ByteLevel(trim_offsets=True)  # pyright: ignore
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=byte_level)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    sample = chat(("user", "q  q"), ("assistant", "x  y"))
    marks = learnt(sample, tokenizer)
    assert marks == [*"u:q", "ĠĠ", *"q;a:", "X", "ĠĠ".upper(), "Y", ";"]
    (tokens,), _ = tokenise_samples([sample], tokenizer, UNBOUNDED, "training")
    assert [label != IGNORED for label in tokens.labels] == [False] * 8 + [True] * 4


def test_a_token_across_the_border_of_a_turn_is_learnt() -> None:
    """The template's last character and the answer's first may be one token, which is predicted."""
    symbols = dict.fromkeys("uqra: ;x")
    vocabulary = {symbol: place for place, symbol in enumerate([*symbols, " x", "<unk>"])}
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [(" ", "x")], unk_token="<unk>")),
        unk_token="<unk>",
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}a: {% endif %}"
    )
    sample = chat(("user", "q"), ("assistant", "xr"))
    (tokens,), _ = tokenise_samples([sample], tokenizer, UNBOUNDED, "training")
    assert tokenizer.convert_ids_to_tokens(tokens.input_ids) == [*"u: q;a:", " x", "r", ";"]
    assert [label != IGNORED for label in tokens.labels] == [False] * 7 + [True] * 3


def test_what_stands_between_the_marks_is_what_the_loss_counts() -> None:
    tokenizer = tokenizer_of()
    sample = chat(("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4"))
    (tokens,), _ = tokenise_samples([sample], tokenizer, UNBOUNDED, "training")
    assert masked_sample(tokens, tokenizer).plain == (
        "<s> [user] w1 [assistant]▶w2 </s>◀[user] w3 [assistant]▶w4 </s>◀"
    )


def test_chats_that_cannot_be_rendered() -> None:
    sample = chat(("user", "w1"), ("assistant", "w2"))
    with pytest.raises(ConfigError, match="no chat template"):
        learnt(sample, tokenizer_of(template=None))
    with pytest.raises(DataError, match="refuses the chat"):
        learnt(sample, tokenizer_of(template="{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(DataError, match="renders the assistant's turn differently"):
        learnt(sample, tokenizer_of(template="{{ messages | length }}"))


def test_a_tokenizer_that_cannot_place_its_tokens_is_refused_for_chats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = tokenizer_of()
    monkeypatch.setattr(type(slow), "is_fast", False)
    with pytest.raises(ConfigError, match="cannot say which characters"):
        learnt(chat(("user", "w1"), ("assistant", "w2")), slow)


def test_tools_reach_the_template() -> None:
    template = "{% for t in tools or [] %}{{ t['function']['name'] }} {% endfor %}" + CHAT
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    for tools in ([{"name": "w9"}], json.dumps([{"name": "w9"}])):
        (sample,) = samples([row(messages=turns, tools=tools)], "messages", {})
        assert "w9" in learnt(sample, tokenizer_of(template=template))
    with pytest.raises(DataError, match="'tools' is not valid JSON"):
        samples([row(messages=turns, tools="{")], "messages", {})


# Lengths.


def test_truncating_cuts_the_end_and_leaves_out_what_has_nothing_to_learn() -> None:
    tokenizer = tokenizer_of()
    rows = [
        Sample("a", "w1", " w2 w3 w4"),
        Sample("b", "w1 w2 w3 w4", " w5"),
        Sample("c", "w1", " w2"),
    ]
    found, report = tokenise_samples(rows, tokenizer, Limit(32, 4, "truncate"), "training")
    assert [tokenizer.convert_ids_to_tokens(its.input_ids) for its in found] == [
        ["<s>", "w1", "w2", "w3"],
        ["<s>", "w1", "w2", "</s>"],
    ]
    assert (report.rows, report.truncated, report.dropped, report.unlearnt) == (3, 1, 0, 1)
    assert str(report).startswith("3 rows, the longest of 7 tokens, 1 truncated, 1 left out")


def test_a_row_of_one_token_is_left_out_and_not_counted_as_cut() -> None:
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer("<unk>"), unk_token="<unk>"
    )
    rows = [Sample("a", "", "w1"), Sample("b", "", "w1 w2")]
    found, report = tokenise_samples(rows, tokenizer, UNBOUNDED, "training")
    assert len(found) == 1
    assert (report.truncated, report.unlearnt) == (0, 1)


def test_dropping_refusing_and_the_model_s_positions() -> None:
    tokenizer = tokenizer_of()
    rows = [Sample("a", "w1", " w2 w3 w4"), Sample("c", "w1", " w2")]

    def tokenised(limit: Limit) -> Any:
        return tokenise_samples(rows, tokenizer, limit, "training")

    found, report = tokenised(Limit(32, 4, "drop"))
    assert [its.place for its in found] == ["c"]
    assert "1 dropped as too long" in str(report)
    with pytest.raises(DataError, match=r"a: 6 tokens, but data.max_length is 4"):
        tokenised(Limit(32, 4, "error"))
    for too_long in ("truncate", "drop", "error"):
        with pytest.raises(DataError, match="a: 6 tokens, but the model has 5 positions"):
            tokenised(Limit(5, None, too_long))
    with pytest.raises(DataError, match="no training row is left"):
        tokenised(Limit(32, 3, "drop"))


def test_a_text_file_becomes_chunks_that_hold_every_token_once() -> None:
    text = " ".join(WORDS[:23])
    for opening, start in (("", []), ("<s>", ["<s>"])):
        tokenizer = tokenizer_of(opening=opening)
        found, report = tokenise_samples(
            [Sample("f", completion=text, whole_text=True)],
            tokenizer,
            Limit(32, 8, "truncate"),
            "x",
        )
        chunks = [tokenizer.convert_ids_to_tokens(its.input_ids) for its in found]
        assert all(chunk[: len(start)] == start for chunk in chunks)
        assert [word for chunk in chunks for word in chunk[len(start) :]] == WORDS[:23]
        assert all(its.labels == its.input_ids for its in found)
        assert max(map(len, chunks)) == 8
        assert report.rows == len(chunks)
        sample, limit = Sample("f", completion=text, whole_text=True), Limit(32, 8, "truncate")
        few, _ = tokenise_samples([sample], tokenizer, limit, "x", max_chunks=2)
        assert few == found[:2]
    with pytest.raises(DataError, match="too short"):
        tokenise_samples(
            [Sample("f", completion="w1", whole_text=True)], tokenizer_of(""), UNBOUNDED, "x"
        )


@pytest.mark.parametrize(
    ("file", "form"),
    [("alpaca_en_demo.json", "alpaca"), ("glaive_toolcall_en_demo.json", "messages")],
)
def test_files_as_users_have_them_are_read(shared: Path, file: str, form: str) -> None:
    path = shared / "data/llamafactory_demo" / file
    found = read_sft(DataSettings(train=str(path)), 0)
    assert found.forms == (form,)
    assert len(found.train) > 200
    assert len(found.held_out) > 20
