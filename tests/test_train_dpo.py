"""Runs on preference pairs: rewards by hand, the reference, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

from runs import WORDS, Result, answered_rows, save_decoder, tensors, write_config, write_jsonl
from runs import msplora as command

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
        assert result.json()["data"] == "held out by the run"


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


@pytest.mark.slow
def test_an_adapter_to_start_from_is_the_reference(folder: Path, start: Path) -> None:
    printed = train(folder, "second", init_from=str(start)).out
    assert f"reference: the base with the adapter {start}" in printed
    run = folder / "second"
    assert read_json(run / "metrics.json")["before"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert not (run / "adapter/ref").exists()
    assert f"It began as the adapter of `{start.name}`." in (run / "README.md").read_text()
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
    first, second = (folder / name / "metrics.json" for name in ("straight", "again"))
    assert first.read_bytes() == second.read_bytes()


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


@pytest.mark.parametrize("method", ["msplora", pytest.param("full", marks=pytest.mark.slow)])
def test_in_bfloat16_it_is_judged_alike_before_in_and_after_the_run(
    folder: Path, method: str
) -> None:
    name = f"bfloat16-{method}"
    rate = {"learning_rate": 1e-3 if method == "full" else 0.02, "eval_batch_size": 5}
    train(folder, name, method=method, dtype="bfloat16", training=rate)
    metrics = read_json(folder / name / "metrics.json")
    assert metrics["before"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    again = command("eval", folder / name, "--json", "--batch-size", 5)
    assert judged(again.json()) == pytest.approx(judged(metrics["best"]), rel=1e-5)


def test_in_bfloat16_embeddings_train_in_float32(folder: Path) -> None:
    adapter = {"modules_to_save": ["embed_tokens"]}
    train(folder, "embeddings", dtype="bfloat16", adapter=adapter, training={"max_steps": 2})
    assert read_json(folder / "embeddings/metrics.json")["best"]["loss"] > 0


def test_an_adapter_with_biases_is_no_start(folder: Path) -> None:
    model = peft.get_peft_model(
        base(folder),
        peft.LoraConfig(target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM"),
    )
    model.save_pretrained(folder / "biased")
    file = write_config(
        folder / "wrong.yaml",
        config(folder, "wrong", method="lora", init_from=str(folder / "biased")),
    )
    result = command("train", file)
    assert result.code == 1
    assert "has trained biases of the base (bias = 'all')" in result.error


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
