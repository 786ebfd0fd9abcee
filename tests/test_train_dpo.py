"""Runs on preference pairs: rewards by hand, the reference, and every form that pairs come in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

from msplora.train.data_preference import read_preferences
from msplora.train.lengths import Limit
from msplora.train.settings_data import DataSettings
from msplora.train.tokenise_preference import tokenise_pairs
from msplora.train.tokenise_sft import IGNORED, whole_row
from runs import WORDS, Result, answered_rows, save_decoder, tensors, write_config, write_jsonl
from runs import msplora as command
from tiny_saved import save_language_model

COUNT = 40
BETA = 0.3


def pairs(count: int) -> list[dict[str, str]]:
    """A prompt, the prompt again as the answer to prefer, and always the same to avoid."""
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["completion"],
            "rejected": " " + " ".join(WORDS[: 1 + place % 3]),
        }
        for place, row in enumerate(answered_rows(count))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, pairs to train on and pairs held out."""
    folder = tmp_path_factory.mktemp("dpo")
    save_decoder(folder / "base")
    write_jsonl(folder / "train.jsonl", pairs(COUNT + 5)[:COUNT])
    write_jsonl(folder / "held.jsonl", pairs(COUNT + 5)[COUNT:])
    write_jsonl(folder / "sft.jsonl", answered_rows(COUNT))
    return folder


def config(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    training = {
        "epochs": 3,
        "batch_size": 10,
        "eval_batch_size": 3,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "dpo_beta": BETA,
    }
    data = {"train": str(folder / "train.jsonl"), "validation": str(folder / "held.jsonl")}
    content: dict[str, Any] = {
        "model": str(folder / "base"),
        "task": "dpo",
        "output": str(folder / name),
        "data": data,
        "training": training | changes.pop("training", {}),
    }
    return content | changes


def train(folder: Path, name: str, *flags: object, **changes: Any) -> Result:
    file = write_config(folder / f"{name}.yaml", config(folder, name, **changes))
    result = command("train", file, *flags)
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """What the run of a pyramid printed."""
    return train(folder, "run").out


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def base(folder: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder / "base").eval()


def log_odds(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """The logarithm of an answer's probability, word by word and without padding."""
    words = ["<s>", *prompt.split(), *answer.split(), "</s>"]
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(words)])
    with torch.no_grad():
        odds = model(input_ids=ids).logits[0].log_softmax(-1)
    places = range(1 + len(prompt.split()), len(words))
    return sum(odds[place - 1, ids[0, place]].item() for place in places)


def by_hand(policy: Any, reference: Any, tokenizer: Any, rows: list[dict[str, str]]) -> Any:
    """DPO's loss and rewards, as the paper has them."""
    losses, margins, right = [], [], []
    for row in rows:
        chosen, rejected = (
            BETA
            * (
                log_odds(policy, tokenizer, row["prompt"], row[name])
                - log_odds(reference, tokenizer, row["prompt"], row[name])
            )
            for name in ("chosen", "rejected")
        )
        margins.append(chosen - rejected)
        losses.append(math.log1p(math.exp(rejected - chosen)))
        right.append(chosen > rejected)
    count = len(rows)
    return {
        "loss": pytest.approx(sum(losses) / count, abs=1e-4),
        "rewards/accuracies": pytest.approx(sum(right) / count),
        "rewards/margins": pytest.approx(sum(margins) / count, abs=1e-4),
    }


def judged(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("loss", "rewards/accuracies", "rewards/margins")}


@pytest.mark.parametrize("method", ["msplora", "lora", "full"])
def test_it_starts_at_the_reference_and_its_metrics_are_those_of_the_paper(
    folder: Path, printed: str, method: str
) -> None:
    run = folder / ("run" if method == "msplora" else method)
    if method != "msplora":
        rate = 1e-3 if method == "full" else 0.02
        train(folder, method, method=method, training={"learning_rate": rate})
    first = next(entry for entry in read_json(run / "log_history.json") if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    metrics = read_json(run / "metrics.json")
    assert metrics["before"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["before"]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert metrics["best"]["loss"] < metrics["before"]["loss"] - 0.01
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "base")
    policy: Any = base(folder)
    if method == "full":
        policy = hf.AutoModelForCausalLM.from_pretrained(run / "model").eval()
    else:
        policy = peft.PeftModel.from_pretrained(policy, str(run / "adapter")).eval()
    expected = by_hand(policy, base(folder), tokenizer, pairs(COUNT + 5)[COUNT:])
    assert judged(metrics["best"]) == expected
    for size in (1, 4):
        result = command("eval", run, "--json", "--batch-size", size)
        assert result.code == 0, result.err
        assert judged(result.json()) == expected


def test_what_is_shown_before_the_first_step(printed: str) -> None:
    row = pairs(1)[0]
    assert f"<s> {row['prompt']}\nchosen: " in printed
    assert f"▶{row['chosen'].strip()} </s>◀" in printed
    assert f"▶{row['rejected'].strip()} </s>◀" in printed
    assert "form of the prompts: prompt-completion" in printed
    assert "reference: the base without the adapter" in printed


@pytest.fixture(scope="module")
def start(folder: Path) -> Path:
    """An adapter that supervised fine-tuning left."""
    file = write_config(
        folder / "start.yaml",
        {
            "model": str(folder / "base"),
            "task": "sft",
            "output": str(folder / "start"),
            "data": {"train": str(folder / "sft.jsonl"), "validation_fraction": 0},
            "training": {"epochs": 4, "batch_size": 4, "learning_rate": 0.02},
        },
    )
    assert command("train", file).code == 0
    return folder / "start"


def test_an_adapter_to_start_from_is_the_reference(folder: Path, start: Path) -> None:
    printed = train(folder, "second", init_from=str(start)).out
    assert f"reference: the base with the adapter {start}" in printed
    run = folder / "second"
    assert read_json(run / "metrics.json")["before"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert not (run / "adapter/ref").exists()
    before, after = tensors(start / "adapter"), tensors(run / "adapter")
    assert list(before) == list(after)
    assert not any(torch.equal(before[key], after[key]) for key in before)
    reference, policy = (
        peft.PeftModel.from_pretrained(base(folder), str(its / "adapter")).eval()
        for its in (start, run)
    )
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "base")
    expected = by_hand(policy, reference, tokenizer, pairs(COUNT + 5)[COUNT:])
    assert judged(read_json(run / "metrics.json")["best"]) == expected
    assert judged(command("eval", run, "--json").json()) == expected


@pytest.mark.slow
def test_a_run_that_started_from_an_adapter_resumes(
    folder: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msplora.train import run as run_module

    changes: dict[str, Any] = {"init_from": str(start), "training": {"batch_size": 5}}
    train(folder, "straight", **changes)

    def stop(*_: Any) -> None:
        raise RuntimeError("stopped")

    file = write_config(folder / "again.yaml", config(folder, "again", **changes))
    with monkeypatch.context() as context:
        context.setattr(run_module, "write_records", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            command("train", file)
    checkpoints = folder / "again.unfinished/checkpoints"
    assert (checkpoints / "checkpoint-16").is_dir()
    # As if it had been stopped while it saved the last one.
    (checkpoints / "checkpoint-24/trainer_state.json").unlink()
    result = command("train", file, "--resume")
    assert result.code == 0, result.err
    first, second = (tensors(folder / name / "adapter") for name in ("straight", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_run_serves_the_other_verbs(folder: Path, printed: str) -> None:
    run = folder / "run"
    assert {file.name for file in (run / "adapter").iterdir()} >= {"task.json", "tokenizer.json"}
    result = command("generate", run, "--prompt", "w1 w2", "--max-new-tokens", 3)
    assert result.code == 0, result.err
    result = command("predict", run, folder / "held.jsonl", "--json", "--max-new-tokens", 3)
    assert result.code == 0, result.err
    assert len(result.out.splitlines()) == 5
    result = command("convert", run, folder / "converted", "--to", "lora")
    assert result.code == 0, result.err
    assert "generate" in printed.partition("The run is in")[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_language_model(tmp_path_factory.mktemp("bytes"), chats=True)
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
    "text prompt": {"prompt": "Hi?", "chosen": [YES], "rejected": [NO]},
    "text answers": {"prompt": [ASKED], "chosen": "Yes.", "rejected": "No."},
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
    assert data.form == "messages"
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

    from msplora.train.data_preference import Pair
    from msplora.train.data_sft import Sample

    pair = Pair(Sample("row 1", "xa", "bc"), Sample("row 1", "xa", "cc"))
    (found,), _ = tokenise_pairs([pair], Merging(), Limit(None, None, "truncate"), "training")
    assert found.prompt_ids == [ord("x")]
    assert found.chosen_ids == [1, ord("c"), 0]
    assert found.rejected_ids == [ord("a"), ord("c"), ord("c"), 0]


def test_pairs_with_nothing_to_prefer_are_counted_and_left_out(folder: Path) -> None:
    rows = pairs(6)
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[2]["chosen"] = " "
    rows[3]["rejected"] = ""
    write_jsonl(folder / "some.jsonl", rows)
    data = {"train": str(folder / "some.jsonl"), "validation_fraction": 0}
    out = " ".join(train(folder, "some", data=data, training={"max_steps": 1}).out.split())
    assert "training: 3 rows" in out
    assert "left out: 1 rows whose two answers are the same" in out
    assert "left out: 2 rows with an empty answer" in out


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
    "only alike": ({"prompt": "Hi?", "chosen": "Yes.", "rejected": "Yes."}, "nothing to prefer"),
}


@pytest.mark.parametrize(("row", "said"), REFUSED.values(), ids=REFUSED)
def test_rows_that_are_no_pairs_are_refused_with_their_place(
    row: dict[str, Any], said: str, tmp_path: Path
) -> None:
    from msplora.train.data_files import DataError

    with pytest.raises(DataError) as refused:
        read(tmp_path, row)
    assert said in str(refused.value)
    assert "rows.json, row 1" in str(refused.value)


WRONG = {
    "packing": ({"training": {"packing": True}}, "for task 'sft', and the task is 'dpo'"),
    "frozen": ({"method": "frozen"}, "task 'dpo' has none"),
    "biases": ({"adapter": {"bias": "all"}}, "trains biases of the base"),
    "metric": ({"training": {"metric_for_best": "accuracy"}}, "rewards/accuracies"),
    "loss": ({"training": {"dpo_loss": "sigmod"}}, "Did you mean 'sigmoid'"),
    "output layer": ({"adapter": {"target_modules": ["lm_head"]}}, "names the output layer"),
}


@pytest.mark.parametrize(("changes", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused_before_anything_is_made(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    file = write_config(folder / "wrong.yaml", config(folder, "wrong", **changes))
    result = command("train", file)
    assert result.code == 1
    assert said in result.error
    assert not list(folder.glob("wrong*/"))


def test_a_key_of_preferences_is_refused_elsewhere(folder: Path) -> None:
    file = write_config(
        folder / "wrong.yaml",
        {
            "model": str(folder / "base"),
            "task": "sft",
            "output": str(folder / "wrong"),
            "data": {"train": str(folder / "sft.jsonl")},
            "training": {"dpo_beta": 0.2},
        },
    )
    assert "for task 'dpo', and the task is 'sft'" in command("train", file).error


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ipo", "hinge", "sigmoid_norm", "apo_zero", "apo_down"])
def test_every_loss_trains(folder: Path, loss: str) -> None:
    train(folder, loss, training={"dpo_loss": loss, "epochs": 4})
    metrics = read_json(folder / loss / "metrics.json")
    assert metrics["best"]["loss"] < metrics["before"]["loss"]
