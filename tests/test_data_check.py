"""The check before training: every count by hand, and a warning for every usual mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from msplora.train.data_check import Said, contradictions, repeats_between, repeats_within
from msplora.train.data_report import data_report
from msplora.train.end_tokens import end_tokens
from msplora.train.settings_file import make_settings
from runs import (
    WORDS,
    labelled_rows,
    msplora,
    save_decoder,
    save_encoder,
    word_tokenizer,
    write_config,
    write_jsonl,
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder and an encoder without their weights: no check may need them."""
    folder = tmp_path_factory.mktemp("bases")
    save_decoder(folder / "sft")
    save_encoder(folder / "classification")
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    return folder


def report(bases: Path, folder: Path, rows: list[Any], task: str = "sft", **data: Any) -> Any:
    content = {
        "model": str(bases / task),
        "task": task,
        "output": str(folder / "run"),
        "data": {"train": str(write_jsonl(folder / "rows.jsonl", rows)), **data},
    }
    return data_report(make_settings(content, "x.yaml"))


def asked(prompt: int, completion: int, start: int = 0) -> dict[str, str]:
    """A row of so many words in the prompt and the completion."""
    words = [WORDS[(start + place) % 50] for place in range(prompt + completion)]
    return {"prompt": " ".join(words[:prompt]), "completion": " " + " ".join(words[prompt:])}


def different(count: int) -> list[dict[str, str]]:
    return [asked(3, 2, start) for start in range(count)]


# Language models.


def test_the_counts_are_those_of_a_count_by_hand(bases: Path, tmp_path: Path) -> None:
    """A row is <s>, the prompt, the completion and </s>."""
    rows = [asked(3, 2), asked(2, 8, 10), asked(9, 1, 20), asked(3, 2), asked(4, 3, 30)]
    rows.append({"prompt": "w1", "completion": ""})
    found = report(bases, tmp_path, rows, max_length=9, validation_fraction=0)
    split = found.check.training
    assert (split.rows, split.kept) == (5, 4)  # that without a completion is no row to learn from
    assert (split.truncated, split.unlearnt, split.dropped) == (1, 1, 0)
    assert split.longest == 1 + 10 + 1
    assert split.tokens == 7 + 9 + 7 + 9
    assert split.trained_tokens == 3 + 6 + 3 + 4
    assert split.median == 8
    assert split.without_end == 1
    assert found.check.held_out is None
    again = found.check.repeated_in_training
    assert again.rows == 1
    assert again.example["row"].endswith("line 4")
    assert again.example["same_as"].endswith("line 1")
    assert found.check.empty == {"an empty completion": 1}
    assert [sample.plain for sample in found.samples[:1]] == ["<s> w0 w1 w2▶w3 w4 </s>◀"]
    said = " ".join(found.check.warnings)
    for words in (
        "1 of 5 (20.0 %) training rows are truncated to data.max_length = 9",
        "the longest has 12 tokens",
        "1 of 5 (20.0 %) training rows are left out without a token to learn",
        "1 of 5 (20.0 %) training rows say what an earlier one says",
        "1 row(s) have an empty completion",
    ):
        assert words in said
    assert "end token" not in said  # the one row without is the truncated one


def test_good_rows_give_no_warning(bases: Path, tmp_path: Path) -> None:
    found = report(bases, tmp_path, different(40))
    assert found.check.warnings == []
    assert found.check.held_out.rows == 4


def test_held_out_rows_that_are_trained_on_are_found(bases: Path, tmp_path: Path) -> None:
    held = [asked(3, 2, 5), asked(2, 2, 45)]
    held[0]["prompt"] = held[0]["prompt"].replace(" ", "  ")  # white space tells no rows apart
    held_file = write_jsonl(tmp_path / "held.jsonl", held)
    found = report(bases, tmp_path, different(20), validation=str(held_file))
    leaked = found.check.held_out_in_training
    assert leaked.rows == 1
    assert leaked.example == {
        "row": f"{held_file}, line 1",
        "same_as": f"{tmp_path / 'rows.jsonl'}, line 6",
        "text": "w5 w6 w7 w8 w9",
    }
    (warning,) = found.check.warnings
    assert warning.startswith("1 of 2 (50.0 %) held-out rows also stand among the training rows")


def test_rows_seen_twice_by_their_weight_are_no_duplicates(bases: Path, tmp_path: Path) -> None:
    source = {"path": str(write_jsonl(tmp_path / "a.jsonl", different(30))), "weight": 2}
    found = report(bases, tmp_path, different(1), train=[source])
    assert found.check.training.rows == 2 * 27
    assert found.check.repeated_in_training.rows == 0
    assert found.check.warnings == []


CHAT = [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}]


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("{{ m.content }} {{ eos_token }}", True),
        ("{{ m.content }} {{ eos_token }}\n", True),  # white space may follow
        ("{{ m.content }}", False),
        ("{{ m.content }} {{ eos_token }} w9", False),
    ],
)
def test_a_template_that_never_ends_a_turn_is_said(
    bases: Path, tmp_path: Path, template: str, ends: bool
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %} " + template + "{% endfor %}")
    rows = [
        {"messages": [{**turn, "content": WORDS[place]} for turn in CHAT[0]["messages"]]}
        for place in range(20)
    ]
    found = report(bases, tmp_path, rows, chat_template=str(file), validation_fraction=0)
    assert found.check.training.without_end == (0 if ends else 20)
    said = [warning for warning in found.check.warnings if "not the end token ('</s>')" in warning]
    assert len(said) == (not ends)
    assert all("name one in data.chat_template" in warning for warning in said)


def test_the_end_is_any_at_which_the_model_stops(tmp_path: Path) -> None:
    save_decoder(tmp_path / "base")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "base")
    generation = hf.GenerationConfig(eos_token_id=[7, 8])
    assert end_tokens(tokenizer, hf.LlamaConfig(eos_token_id=9), generation, None) == {2, 7, 8, 9}
    tokenizer.eos_token = None
    assert end_tokens(tokenizer) == set()


def test_what_a_template_has_no_place_for_is_said(bases: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %} {{ m.content }} {{ eos_token }}{% endfor %}")
    call = {"function": {"name": "f", "arguments": {}}}
    turns = [CHAT[0]["messages"][0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    rows = [{"messages": turns, "tools": [{"name": "f"}]}, *CHAT]
    found = report(bases, tmp_path, rows, chat_template=str(file), validation_fraction=0)
    said = " ".join(found.check.warnings)
    assert "1 of 2 (50.0 %) rows have tools, but the chat template has no place for them" in said
    assert "1 of 2 (50.0 %) rows have calls of tools, but the chat template knows none" in said
    file.write_text(file.read_text() + "{# tools tool_calls #}")
    assert report(bases, tmp_path, rows, chat_template=str(file)).check.warnings == []


def test_empty_prompts_and_answers_are_counted(bases: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %} {{ m.content }} {{ eos_token }}{% endfor %}")
    rows = [{**row, "prompt": " "} if place < 2 else row for place, row in enumerate(different(9))]
    found = report(bases, tmp_path, rows)
    assert found.check.empty == {"an empty prompt": 2}
    silent = {"role": "assistant", "content": " "}
    rows = [*CHAT, {"messages": [CHAT[0]["messages"][0], silent]}]
    found = report(bases, tmp_path, rows, chat_template=str(file), validation_fraction=0)
    assert found.check.empty == {"an empty turn of the assistant": 1}


def test_chunks_of_a_text_end_nowhere_and_are_no_duplicates(bases: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w1 w2 w3 w4 w5\n" * 40)
    found = report(bases, tmp_path, [], train=str(tmp_path / "a.txt"), max_length=11)
    assert found.check.training.rows == 18
    assert found.check.training.without_end is None
    assert found.check.warnings == []


# Classifiers.


def test_classes_are_counted_and_what_is_odd_in_them_is_said(bases: Path, tmp_path: Path) -> None:
    rows = [{"text": f"w{place}", "label": "good" if place % 2 else "bad"} for place in range(40)]
    rows += [{"text": "w40", "label": "odd"}, {"text": "W1", "label": "bad"}]
    rows += [{"text": " ", "label": "good"}]
    held = write_jsonl(
        tmp_path / "held.jsonl",
        [{"text": "w3", "label": "good"}, {"text": "w9 w9", "label": "bad"}],
    )
    found = report(
        bases,
        tmp_path,
        rows,
        "classification",
        validation=str(held),
        labels=["bad", "good", "odd", "never"],
    )
    assert found.check.training.classes == {"bad": 21, "good": 21, "odd": 1, "never": 0}
    assert found.check.held_out.classes == {"bad": 1, "good": 1, "odd": 0, "never": 0}
    assert found.check.training.trained_tokens is None
    assert "training rows of each class: bad 21, good 21, odd 1" in " ".join(found.notes)
    said = " ".join(found.check.warnings)
    for words in (
        "the class 'odd' has 1 training row(s), too few",
        "no training row is of the class 'never'",
        "no held-out row is of the class(es) odd, never",
        "1 of 2 (50.0 %) held-out rows also stand among the training rows",
        "1 of 43 (2.3 %) training rows say what an earlier one says, under another label",
        "1 row(s) have an empty text",
    ):
        assert words in said
    assert [sample.plain for sample in found.samples[:1]] == ["[CLS] w0 [SEP]\n→ label = bad"]


def test_good_classes_give_no_warning_and_numbers_have_none(bases: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": f"w{place % 50} w{place // 50}", "label": place % 2} for place in range(80)
    ]
    assert report(bases, tmp_path, rows, "classification").check.warnings == []
    found = report(bases, tmp_path, rows, "classification", regression=True)
    assert found.check.training.classes is None
    assert found.check.warnings == []


def test_two_texts_that_the_tokenizer_glues_are_said(bases: Path, tmp_path: Path) -> None:
    rows = [
        {"sentence1": f"w{place % 50}", "sentence2": f"w{place // 50}", "label": place % 2}
        for place in range(80)
    ]
    assert report(bases, tmp_path, rows, "classification").check.warnings == []
    shutil.copytree(bases / "classification", tmp_path / "classification")
    hf.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer("[UNK]", "[PAD]"), unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(tmp_path / "classification")
    (warning,) = report(tmp_path, tmp_path, rows, "classification").check.warnings
    assert "puts nothing between the texts of sentence1 and sentence2" in warning
    alone = [{"text": its["sentence1"] + its["sentence2"], "label": its["label"]} for its in rows]
    assert report(tmp_path, tmp_path, alone, "classification").check.warnings == []


# Duplicates.


def said(*texts: str, label: str = "") -> list[Said]:
    return [Said(f"row {place}", text, label) for place, text in enumerate(texts)]


def test_texts_are_the_same_but_for_case_and_white_space() -> None:
    assert repeats_within(said("a b", "A  B\n", "ab", "a b")).rows == 2
    assert repeats_within(said("a b", "ab")).example is None
    assert repeats_between(said("x", "y", "Y"), said("y")).rows == 2
    odd = [*said("a", "b", label="0"), Said("row 2", "A", "1"), Said("row 3", "b", "0")]
    assert contradictions(odd).rows == 1
    example = repeats_within(said("a", "a " * 200, "a " * 200)).example
    assert example
    assert len(example["text"]) == 100


# The command.


@pytest.mark.parametrize("task", ["sft", "classification"])
def test_the_command_says_what_the_run_will_write(task: str, tmp_path: Path) -> None:
    save = save_decoder if task == "sft" else save_encoder
    rows = different(20) if task == "sft" else labelled_rows(40)
    content = {
        "model": str(save(tmp_path / "base")),
        "task": task,
        "output": str(tmp_path / "run"),
        "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", [*rows, *rows[:2]]))},
        "training": {"max_steps": 1},
    }
    file = write_config(tmp_path / "run.yaml", content)
    result = msplora("data", file, "--json")
    assert result.code == 0, result.err
    shown = msplora("data", file, "--rows", 2).out
    assert shown.count("Training row") == 2
    assert not (tmp_path / "run").exists()
    trained = msplora("train", file)
    assert trained.code == 0, trained.err
    assert json.loads((tmp_path / "run/data.json").read_text()) == result.json()
    for line in shown.splitlines():
        if line.startswith(("•", "!")):
            assert line in trained.out


def test_the_command_refuses_what_a_run_refuses(bases: Path, tmp_path: Path) -> None:
    content = {
        "model": str(bases / "sft"),
        "task": "sft",
        "output": "run",
        "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", different(9)))},
    }
    file = write_config(tmp_path / "run.yaml", content)
    for change, words in (
        ("data.train=nothing.jsonl", "does not exist"),
        ("data.max_length=1000", "the model has 64 positions"),
        ("data.max_len=3", "unknown key 'data.max_len'"),
        ("model=./nowhere", "there is no such folder"),
    ):
        result = msplora("data", file, "--set", change)
        assert result.code == 1
        assert words in result.error
