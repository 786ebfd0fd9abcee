"""Preference pairs: every form they come in, their tokens, and the check before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from msplora.train.data_files import DataError, read_rows
from msplora.train.data_preference import (
    Pair,
    read_more_preferences,
    read_preferences,
    read_prompts,
)
from msplora.train.data_report import data_report
from msplora.train.data_sft import Sample
from msplora.train.lengths import Limit
from msplora.train.settings_data import DataSettings
from msplora.train.settings_file import make_settings
from msplora.train.tokenise_preference import tokenise_pairs
from msplora.train.tokenise_sft import IGNORED, whole_row
from runs import msplora, write_config, write_jsonl
from tiny_saved import save_language_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of bytes."""
    return save_language_model(tmp_path_factory.mktemp("bytes"), chats=True)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return hf.AutoTokenizer.from_pretrained(folder)


def read(tmp_path: Path, row: dict[str, Any], **data: Any) -> Any:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row]))
    settings = DataSettings(train=str(file), validation_fraction=0, **data)
    return read_preferences(settings, 0)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = turn("user", "Hi?")
YES, NO = turn("assistant", "Yes."), turn("assistant", "No.")
CHATS = {
    "turns": {"prompt": [ASKED], "chosen": [YES], "rejected": [NO]},
    "one turn each": {"messages": [ASKED], "chosen": YES, "rejected": NO},
    "whole chats": {"chosen": [ASKED, YES], "rejected": [ASKED, NO]},
    "whole chats with a prompt": {"prompt": "Hi?", "chosen": [ASKED, YES], "rejected": [ASKED, NO]},
    "turns as JSON": {"messages": json.dumps([ASKED]), "chosen": "Yes.", "rejected": "No."},
    "text prompt": {"prompt": "Hi?", "chosen": [YES], "rejected": [NO]},
    "text answers": {"prompt": [ASKED], "chosen": "Yes.", "rejected": "No."},
    "whole chats beside the chosen one": {
        "prompt": "Hi?",
        "messages": [ASKED, YES],
        "chosen": [ASKED, YES],
        "rejected": [ASKED, NO],
    },
    "weights": {"prompt": [ASKED], "chosen": YES | {"weight": 1}, "rejected": NO | {"weight": 0}},
    "flags": {
        "prompt": [ASKED],
        "chosen": YES | {"train": True},
        "rejected": NO | {"train": False},
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi?"}],
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
    },
}


@pytest.mark.parametrize("row", CHATS.values(), ids=CHATS)
def test_every_form_of_a_chat_gives_the_same_pair(
    row: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    data = read(tmp_path, row)
    assert data.forms == ("messages",)
    (found,), _ = tokenise_pairs(data.train, tokenizer, Limit(512, None, "truncate"), "training")
    assert tokenizer.decode(found.prompt_ids) == "[user] Hi?</s>[assistant] "
    assert tokenizer.decode(found.chosen_ids) == "Yes.</s>"
    assert tokenizer.decode(found.rejected_ids) == "No.</s>"


def test_earlier_turns_of_the_assistant_are_part_of_the_prompt(
    tmp_path: Path, tokenizer: Any
) -> None:
    row = {"prompt": [ASKED, YES, ASKED], "system": "Be brief.", "chosen": [NO], "rejected": [YES]}
    data = read(tmp_path, row)
    (found,), _ = tokenise_pairs(data.train, tokenizer, Limit(512, None, "truncate"), "training")
    assert tokenizer.decode(found.prompt_ids) == (
        "[system] Be brief.</s>[user] Hi?</s>[assistant] Yes.</s>[user] Hi?</s>[assistant] "
    )
    assert tokenizer.decode(found.chosen_ids) == "No.</s>"


def test_an_answer_keeps_its_calls_and_its_thoughts(tmp_path: Path) -> None:
    call = {"function_call": {"name": "add", "arguments": '{"a": 1}'}}
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    row = {
        "prompt": [ASKED],
        "chosen": {"role": "assistant", "content": None, **call},
        "rejected": NO | {"reasoning_content": "Hm."},
    }
    (pair,) = read(tmp_path, row).train
    assert pair.chosen.messages[-1] == turn("assistant", "") | {"tool_calls": calls}
    assert pair.rejected.messages[-1] == NO | {"reasoning_content": "Hm."}
    row["chosen"] = {"from": "function_call", "value": json.dumps(call["function_call"])}
    (again,) = read(tmp_path, row).train
    assert again.chosen == pair.chosen
    # Thoughts alone tell two answers apart.
    assert len(read(tmp_path, row | {"chosen": NO | {"reasoning_content": "Hm!"}}).train) == 1


def test_a_system_prompt_that_only_the_prompt_has_is_kept(tmp_path: Path) -> None:
    row = {"prompt": [turn("system", "S"), ASKED], "chosen": [ASKED, YES], "rejected": [ASKED, NO]}
    (pair,) = read(tmp_path, row).train
    assert pair.chosen.messages == (turn("system", "S"), ASKED, YES)


# Several sources.


def test_every_source_has_its_own_form_and_columns(tmp_path: Path, tokenizer: Any) -> None:
    texts = [{"question": f"{its}?", "chosen": "Yes.", "rejected": "No."} for its in range(9)]
    mapped = {"path": str(write_jsonl(tmp_path / "a.jsonl", texts))}
    chats = [{"prompt": [ASKED], "chosen": [YES], "rejected": [NO]}] * 9
    plain = {"path": str(write_jsonl(tmp_path / "b.jsonl", chats))}
    both = [mapped | {"columns": {"prompt": "question"}}, plain]
    found = read_preferences(DataSettings.model_validate({"train": both}), 0)
    assert found.forms == ("prompt-completion", "messages")
    counts = [(its.form, its.train + its.held_out) for its in found.sources]
    assert counts == [("prompt-completion", 9), ("messages", 9)]
    # Without columns of its own a source has those of all; with an empty map it has none.
    both = [mapped, plain | {"columns": {}}]
    data = DataSettings.model_validate({"train": both, "columns": {"prompt": "question"}})
    assert read_preferences(data, 0).forms == found.forms


@pytest.mark.parametrize("of_its_own", [True, False])
def test_another_file_may_be_like_any_of_the_sources(tmp_path: Path, of_its_own: bool) -> None:
    texts = [{"question": "1?", "chosen": "Yes.", "rejected": "No."}]
    given = str(write_jsonl(tmp_path / "given.jsonl", texts))
    sources = [{"path": "x.jsonl"}, {"path": "y.jsonl", "columns": {"prompt": "question"}}]
    data = DataSettings.model_validate({"train": sources if of_its_own else "x.jsonl"})
    forms: Any = ("prompt-completion", "messages")
    if not of_its_own:
        for attempt in (
            lambda: read_more_preferences(given, forms, data),
            lambda: read_prompts(read_rows(given), forms, data),
        ):
            with pytest.raises(DataError, match=r"given\.jsonl, line 1"):
                attempt()
        return
    (pair,), _ = read_more_preferences(given, forms, data)
    assert (pair.chosen.prompt, pair.chosen.completion) == ("1?", "Yes.")
    (asked,) = read_prompts(read_rows(given), forms, data)
    assert (asked.prompt, asked.messages) == ("1?", ())
    with pytest.raises(DataError, match="was trained on 'messages'"):
        read_more_preferences(given, ("messages",), data)


TEXTS = {
    "texts": ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}, {}, "Hi?"),
    "alpaca": (
        {"instruction": "Say.", "input": "Hi", "chosen": "Yes.", "rejected": "No.", "output": "!"},
        {},
        "### Instruction:\nSay.\n\n### Input:\nHi\n\n### Response:\n",
    ),
    "renamed": (
        {"question": "Hi?", "good": "Yes.", "bad": "No."},
        {"prompt": "question", "chosen": "good", "rejected": "bad"},
        "Hi?",
    ),
}


@pytest.mark.parametrize(("row", "columns", "prompt"), TEXTS.values(), ids=TEXTS)
def test_a_pair_is_written_as_supervised_fine_tuning_writes_it(
    row: dict[str, str], columns: dict[str, str], prompt: str, tmp_path: Path, tokenizer: Any
) -> None:
    data = read(tmp_path, row, columns=columns)
    (found,), _ = tokenise_pairs(data.train, tokenizer, Limit(512, None, "truncate"), "training")
    assert tokenizer.decode(found.prompt_ids) == f"<s>{prompt}"
    for sample, ids in (
        (data.train[0].chosen, found.chosen_ids),
        (data.train[0].rejected, found.rejected_ids),
    ):
        learnt = whole_row(sample, tokenizer)
        assert learnt.input_ids == found.prompt_ids + ids
        assert [its for its in learnt.labels if its != IGNORED] == ids


def test_a_token_over_the_end_of_the_prompt_belongs_to_both_answers() -> None:
    class Merging:
        """Whole characters, but for "ab", which is one token."""

        eos_token_id = 0
        chat_template = None

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            merged = [text.replace("ab", "\x01") for text in texts]
            return {"input_ids": [[ord(letter) for letter in text] for text in merged]}

    pair = Pair(Sample("row 1", "xa", "bc"), Sample("row 1", "xa", "cc"))
    (found,), _ = tokenise_pairs([pair], Merging(), Limit(None, None, "truncate"), "training")
    assert found.prompt_ids == [ord("x")]
    assert found.chosen_ids == [1, ord("c"), 0]
    assert found.rejected_ids == [ord("a"), ord("c"), ord("c"), 0]


def test_long_pairs_are_cut_dropped_or_left_out_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    def found(length: int, too_long: Any, **row: str) -> tuple[list[Any], dict[str, int]]:
        data = read(tmp_path, {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."} | row)
        other = read(tmp_path, {"prompt": "A", "chosen": "B", "rejected": "C"})
        limit = Limit(512, length, too_long)
        rows, report = tokenise_pairs(data.train + other.train, tokenizer, limit, "training")
        return rows, report.left_out()

    rows, counts = found(6, "truncate")
    assert counts == {"truncated": 1}
    assert [tokenizer.decode(ids) for ids in (rows[0].chosen_ids, rows[0].rejected_ids)] == [
        "Ye",
        "No",
    ]
    assert found(6, "drop")[1] == {"dropped": 1}
    assert found(4, "truncate")[1] == {"unlearnt": 1}  # the prompt fills it
    assert found(6, "truncate", chosen="No!", rejected="No.")[1] == {"unlearnt": 1}  # alike so far
    assert found(9, "truncate")[1] == {}


REFUSED = {
    "no answers": ({"prompt": "Hi?", "completion": "Yes."}, "'chosen' and 'rejected' is missing"),
    "misspelt": ({"prompt": "Hi?", "chosen": "Yes.", "rejectd": "No."}, "'rejected'?"),
    "no prompt": ({"chosen": "Yes.", "rejected": "No."}, "a prompt is missing"),
    "nothing shared": ({"chosen": [YES], "rejected": [NO]}, "must be text or a list of turns"),
    "two turns": ({"prompt": [ASKED], "chosen": [YES, ASKED], "rejected": [NO]}, "2 turn(s)"),
    "of the user": ({"prompt": [ASKED], "chosen": ASKED, "rejected": NO}, "1 turn(s) of user"),
    "a number": ({"prompt": "Hi?", "chosen": 3, "rejected": "No."}, "'chosen' must be text"),
    "only alike": (
        {"prompt": "Hi?", "chosen": "Yes.", "rejected": "Yes."},
        "twice, so nothing to prefer",
    ),
}


@pytest.mark.parametrize(("row", "said"), REFUSED.values(), ids=REFUSED)
def test_rows_that_are_no_pairs_are_refused_with_their_place(
    row: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as refused:
        read(tmp_path, row)
    assert said in str(refused.value)
    assert "rows.json, row 1" in str(refused.value)


# The check before training.


def pair(place: int, chosen: str = "Yes.", rejected: str = "No.") -> dict[str, str]:
    return {"prompt": f"{place}? ", "chosen": chosen, "rejected": rejected}


def config(folder: Path, tmp_path: Path, rows: list[Any], **data: Any) -> dict[str, Any]:
    return {
        "model": str(folder),
        "task": "dpo",
        "output": str(tmp_path / "run"),
        "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), **data},
        "training": {"max_steps": 1},
    }


def check(folder: Path, tmp_path: Path, rows: list[Any], **data: Any) -> Any:
    return data_report(make_settings(config(folder, tmp_path, rows, **data), "x.yaml")).check


def test_the_counts_are_those_of_a_count_by_hand(folder: Path, tmp_path: Path) -> None:
    # <s>, "1? " and four bytes with </s>; of the long one <s> and "2? " and four that are left.
    rows = [pair(1, "Yes."), pair(2, "Yes, of course."), pair(3, "Y"), pair(4, "", "No.")]
    found = check(folder, tmp_path, rows, validation_fraction=0, max_length=9)
    its = found.training
    assert (its.rows, its.kept, its.truncated, its.dropped, its.unlearnt) == (3, 3, 1, 0, 0)
    assert its.tokens == (4 + 5) + (4 + 5) + (4 + 4)
    assert its.trained_tokens == (5 + 4) + (5 + 4) + (2 + 4)
    assert (its.longest, its.median, its.without_end) == (4 + 16, 9, 1)
    assert found.empty == {"an empty answer": 1}
    assert found.sources == [
        {"name": str(tmp_path / "rows.jsonl"), "form": "prompt-completion", "weight": 1.0}
        | {"train": 3, "held_out": 0}
    ]


def test_good_pairs_give_no_warning(folder: Path, tmp_path: Path) -> None:
    rows = [pair(place, *("Yes.", "No.")[:: 1 if place % 2 else -1]) for place in range(20)]
    assert check(folder, tmp_path, rows).warnings == []


def test_pairs_that_are_held_out_and_trained_on_are_found(folder: Path, tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [pair(3), pair(90)])
    found = check(folder, tmp_path, [pair(place) for place in range(9)], validation=str(held))
    assert found.held_out_in_training.rows == 1
    assert any("1 of 2 (50.0 %) held-out rows also stand" in its for its in found.warnings)


def test_a_pair_the_other_way_round_is_found(folder: Path, tmp_path: Path) -> None:
    rows = [*(pair(place) for place in range(9)), pair(4, "No.", "Yes.")]
    found = check(folder, tmp_path, rows, validation_fraction=0)
    (said,) = (its for its in found.warnings if "the wrong way round" in its)
    assert "1 of 10" in said
    assert "line 10 and " in said
    assert "line 5. " in said


def test_answers_that_are_preferred_for_their_length_are_told(folder: Path, tmp_path: Path) -> None:
    rows = [pair(place) for place in range(20)]
    (said,) = check(folder, tmp_path, rows, validation_fraction=0).warnings
    assert "in 20 of 20 (100.0 %) training pairs the chosen answer is the longer" in said


def test_the_command_says_what_the_run_will_write(folder: Path, tmp_path: Path) -> None:
    rows = [pair(place, "Yes, so it is.") for place in range(20)]
    file = write_config(tmp_path / "run.yaml", config(folder, tmp_path, rows))
    shown = msplora("data", file, "--json")
    assert shown.code == 0, shown.err
    assert "chosen:   ▶Yes, so it is.</s>◀" in msplora("data", file, "--rows", 1).out
    trained = msplora("train", file)
    assert trained.code == 0, trained.err
    assert json.loads((tmp_path / "run/data.json").read_text()) == shown.json()
