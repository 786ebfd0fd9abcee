"""Runs of a language model: the loss is of completions, and what is left is whole and usable."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
import yaml

from msplora.errors import ConfigError
from msplora.train import prediction, saved_run
from msplora.train.base_model import load_base, load_tokenizer
from msplora.train.methods import adapt
from msplora.train.next_steps import next_steps
from msplora.train.settings_file import make_settings, read_settings
from msplora.train.task_record import TaskRecord
from runs import (
    WORDS,
    Result,
    answered_rows,
    save_decoder,
    tensors,
    write_config,
    write_jsonl,
)
from runs import (
    msplora as command,
)

COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, training rows and held-out rows."""
    folder = tmp_path_factory.mktemp("sft")
    save_decoder(folder / "base")
    rows = answered_rows(COUNT + 10)
    write_jsonl(folder / "train.jsonl", rows[:COUNT])
    write_jsonl(folder / "held.jsonl", rows[COUNT:])
    return folder


def config(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    training = {"epochs": 2, "batch_size": COUNT, "learning_rate": 0.01, "logging_steps": 1}
    content: dict[str, Any] = {
        "model": str(folder / "base"),
        "task": "sft",
        "output": str(folder / name),
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "held.jsonl"),
        },
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


def loss_by_hand(model: Any, rows: list[dict[str, str]], tokenizer: Any) -> tuple[float, int]:
    """Row by row without padding, word by word: the sum of the completions' losses."""
    loss, count = 0.0, 0
    for row in rows:
        prompt, answer = row["prompt"].split(), row["completion"].split()
        words = ["<s>", *prompt, *answer, "</s>"]
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(words)])
        with torch.no_grad():
            odds = model(input_ids=ids).logits[0].log_softmax(-1)
        for place in range(1 + len(prompt), len(words)):
            loss -= odds[place - 1, ids[0, place]].item()
            count += 1
    return loss, count


def base_and_tokenizer(folder: Path) -> tuple[Any, Any]:
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    return model, hf.AutoTokenizer.from_pretrained(folder / "base")


@pytest.mark.parametrize("method", ["msplora", "lora", "full"])
def test_the_first_loss_is_the_base_s_loss_on_completions(
    folder: Path, printed: str, method: str
) -> None:
    """All rows are in the first batch, and every method starts equal to the base."""
    if method != "msplora":
        train(folder, method, method=method, training={"epochs": 1})
    run = folder / ("run" if method == "msplora" else method)
    model, tokenizer = base_and_tokenizer(folder)
    rows = answered_rows(COUNT + 10)
    loss, count = loss_by_hand(model, rows[:COUNT], tokenizer)
    first = next(entry for entry in read_json(run / "log_history.json") if "loss" in entry)
    assert first["loss"] == pytest.approx(loss / count, abs=2e-4)
    before = read_json(run / "metrics.json")["before"]
    loss, count = loss_by_hand(model, rows[COUNT:], tokenizer)
    assert before["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert before["tokens"] == count
    assert before["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)


def test_the_loss_of_everything_counts_prompts_too(folder: Path) -> None:
    train(folder, "whole", training={"completion_only_loss": False, "epochs": 1})
    model, tokenizer = base_and_tokenizer(folder)
    rows = [
        {"prompt": "", "completion": row["prompt"] + row["completion"]}
        for row in answered_rows(COUNT)
    ]
    loss, count = loss_by_hand(model, rows, tokenizer)
    first = next(it for it in read_json(folder / "whole/log_history.json") if "loss" in it)
    assert first["loss"] == pytest.approx(loss / count, abs=2e-4)


def test_what_is_shown_before_the_first_step(printed: str) -> None:
    before = printed.partition("epoch 1.00")[0]
    assert "16 pairs" in before
    assert "3,136" in before  # 4 layers, 32 → 32 and 32 → 16: (64 + 48) · (8 + 3 · 4 + 4 · 2)
    assert "3,584" in before  # LoRA: (64 + 48) · 4 · 8
    assert "form: prompt-completion" in before
    row = answered_rows(1)[0]
    assert f"<s> {row['prompt']}▶{row['completion'].strip()} </s>◀" in before


def test_the_run_folder_is_complete(folder: Path, printed: str) -> None:
    run = folder / "run"
    assert {file.name for file in run.iterdir()} == {
        "README.md",
        "adapter",
        "config.yaml",
        "data.json",
        "levels.json",
        "log_history.json",
        "loss.png",
        "metrics.json",
        "plan.json",
        "plan.txt",
        "run.json",
        "versions.json",
    }
    settings = read_settings(run / "config.yaml")
    assert settings == read_settings(folder / "run.yaml")
    assert settings.training.warmup_ratio == 0.06  # the defaults are written out too
    assert "warmup_ratio" in (run / "config.yaml").read_text()
    plan = read_json(run / "plan.json")
    assert (plan["trainable"], plan["lora"], plan["rank_per_layer"]) == (3136, 3584, 14)
    assert len(plan["plan"]["pairs"]) == 16
    saved = tensors(run / "adapter")
    assert sum(tensor.numel() for tensor in saved.values()) == 3136
    assert read_json(run / "versions.json")["peft"] == peft.__version__
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (run / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in front  # of a folder the hub would refuse the name
    assert str(folder) not in card.partition("## Use")[0]
    for entry in read_json(run / "metrics.json")["evaluations"]:
        assert f"{entry['loss']:.4f}" in card
    assert "3,136" in card
    training = yaml.safe_load((run / "config.yaml").read_text())["training"]
    assert f"| learning rate | {training['learning_rate']:g}, {training['scheduler']} |" in card
    assert f"| rows per step | {training['batch_size']} |" in card
    assert (run / "adapter/README.md").read_text() == card


def commands(printed: str) -> dict[str, list[str]]:
    """What the run said can be done next."""
    lines = printed.partition("The run is in")[2].splitlines()[1:]
    found = {}
    for line in lines:
        what, _, text = line.strip().partition(" ")
        found[what] = shlex.split(text)
    return found


def test_the_printed_commands_do_what_they_say(folder: Path, printed: str) -> None:
    found = commands(printed)
    assert list(found) == ["evaluate", "generate", "convert", "merge", "serve"]
    best = read_json(folder / "run/metrics.json")["best"]
    measured = command(*found["evaluate"][1:], "--json").json()
    assert measured["loss"] == pytest.approx(best["loss"], rel=1e-6)
    assert measured["token_accuracy"] == best["token_accuracy"]
    answer = command(*found["generate"][1:-1], "w1 w2", "--json", "--max-new-tokens", 5).json()
    assert set(answer) == {"prompt", "completion"}

    _, tokenizer = base_and_tokenizer(folder)
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(["<s>", *WORDS[:9]])])

    def logits(adapter: str | None, base: Path = folder / "base") -> torch.Tensor:
        model = hf.AutoModelForCausalLM.from_pretrained(base)
        if adapter:
            model = peft.PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    adapted = logits(str(folder / "run/adapter"))
    assert not torch.allclose(adapted, logits(None), atol=1e-3)
    for what in ("convert", "merge"):
        assert command(*found[what][1:]).code == 0
    assert torch.allclose(adapted, logits(found["convert"][-1]), atol=1e-4)
    assert torch.allclose(adapted, logits(None, Path(found["merge"][-1])), atol=1e-4)
    serve = found["serve"]
    assert serve[:3] == ["vllm", "serve", str(folder / "base")]
    assert int(serve[serve.index("--max-lora-rank") + 1]) >= 14
    assert serve[-1] == f"run={found['convert'][-1]}"


def test_a_plain_lora_is_served_as_it_is_and_a_full_model_as_a_model(folder: Path) -> None:
    for method in ("lora", "full"):
        name = f"{method}-served"
        found = commands(train(folder, name, method=method, training={"epochs": 1}).out)
        assert ("convert" in found, "serve" in found) == (False, method == "lora")
        measured = command(*found["evaluate"][1:], "--json").json()
        best = read_json(folder / name / "metrics.json")["best"]
        assert measured["loss"] == pytest.approx(best["loss"], rel=1e-6)
    assert found["evaluate"][-1].endswith("full-served")
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "full-served/model")
    assert sum(parameter.numel() for parameter in model.parameters()) > 10_000


def test_generate_and_predict_continue_as_the_model_does(
    folder: Path, printed: str, tmp_path: Path
) -> None:
    """Against a greedy search written out; the prompt has the form it was trained on."""
    base, tokenizer = base_and_tokenizer(folder)
    model = peft.PeftModel.from_pretrained(base, str(folder / "run/adapter")).eval()
    ids = tokenizer.convert_tokens_to_ids(["<s>", "w1", "w2"])
    start = len(ids)
    while len(ids) < start + 6 and ids[-1] != tokenizer.eos_token_id:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    run = folder / "run"
    arguments = (run, "--prompt", "w1 w2", "--max-new-tokens", 6)
    assert command("generate", *arguments).out.strip() == expected
    file = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": "w1 w2"}, {"prompt": "w3"}])
    out = tmp_path / "answers.jsonl"
    assert command("predict", run, file, "--output", out, "--max-new-tokens", 6).code == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["row"] for line in lines] == [1, 2]
    assert lines[0]["completion"] == expected
    refused = command("predict", run, file, "--output", out)
    assert refused.code == 1
    assert "exists" in refused.error
    assert [json.loads(line) for line in out.read_text().splitlines()] == lines
    sampled = [
        command("generate", *arguments, "--temperature", 5, "--seed", seed).out
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_the_loss_of_held_out_rows_depends_on_no_batch(folder: Path, printed: str) -> None:
    found = [
        command("eval", folder / "run", "--batch-size", size, "--json").json()["loss"]
        for size in (1, 3, 100)
    ]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)
    by_file = command("eval", folder / "run", "--data", folder / "held.jsonl", "--json").json()
    assert by_file["loss"] == pytest.approx(found[0], rel=1e-6)


def test_a_text_file_and_a_chat_train_too(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("\n".join(" ".join(WORDS[n % 40 : n % 40 + 9]) for n in range(60)))
    data = {"train": str(text), "max_length": 32}
    train(folder, "book", data=data, method="full", training={"batch_size": 4})
    metrics = read_json(folder / "book/metrics.json")
    found = command("eval", folder / "book", "--json").json()
    assert found["data"] == "held out by the run"
    assert found["loss"] == pytest.approx(metrics["best"]["loss"], rel=1e-6)
    assert metrics["best"]["loss"] < metrics["before"]["loss"]

    template = tmp_path / "chat.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %} {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
    )
    rows = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ]
        }
        for row in answered_rows(COUNT)
    ]
    data = {
        "train": str(write_jsonl(tmp_path / "chats.jsonl", rows)),
        "validation": str(tmp_path / "chats.jsonl"),
        "chat_template": str(template),
    }
    out = train(folder, "chat", data=data, training={"epochs": 1}).out
    assert "form: messages" in out
    model, tokenizer = base_and_tokenizer(folder)
    loss, count = loss_by_hand(model, answered_rows(COUNT), tokenizer)
    before = read_json(folder / "chat/metrics.json")["before"]
    assert before["loss"] == pytest.approx(loss / count, rel=1e-5)
    template.unlink()  # it was saved with the adapter
    assert command("generate", folder / "chat", "--prompt", "w1", "--max-new-tokens", 3).code == 0


def test_packed_rows_are_all_learnt_and_warm_up_by_their_own_number(folder: Path) -> None:
    training = {"packing": True, "batch_size": 1, "epochs": 4, "warmup_ratio": 0.25}
    data = {"train": str(folder / "train.jsonl"), "max_length": 64, "validation_fraction": 0}
    train(folder, "packed", data=data, training=training)
    history = [it for it in read_json(folder / "packed/log_history.json") if "loss" in it]
    steps = len(history)
    assert steps < COUNT  # packed
    rates = [entry["learning_rate"] for entry in history]
    assert rates.index(max(rates)) == math.ceil(steps * 0.25)
    assert max(rates) == pytest.approx(0.01)


def test_nothing_is_held_out_where_nothing_is_asked_for(folder: Path) -> None:
    data = {"train": str(folder / "train.jsonl"), "validation_fraction": 0}
    train(folder, "blind", data=data, training={"epochs": 1})
    metrics = read_json(folder / "blind/metrics.json")
    assert metrics["before"] is None
    assert metrics["evaluations"] == []
    assert metrics["best"]["step"] == 1
    refused = command("eval", folder / "blind")
    assert refused.code == 1
    assert "held out no rows" in refused.error


def test_the_last_step_is_judged_where_no_evaluation_was_due(folder: Path) -> None:
    train(folder, "short", training={"max_steps": 3, "eval_steps": 50, "batch_size": 4})
    metrics = read_json(folder / "short/metrics.json")
    assert [entry["step"] for entry in metrics["evaluations"]] == [3]
    assert metrics["best"]["step"] == 3


# Starting from an adapter.


def test_a_run_starts_from_an_adapter_and_keeps_its_shape(folder: Path) -> None:
    adapter = {"ranks": [4, 2], "groups": [1, 0], "levels": ["all", "own"], "alphas": [8, 4]}
    adapter |= {"target_modules": "all-linear"}  # type: ignore[dict-item]
    train(folder, "first", adapter=adapter)
    first = folder / "first"
    best = read_json(first / "metrics.json")["best"]
    for name, its in (("again", {}), ("same-shape", adapter)):
        train(folder, name, init_from=str(first), adapter=its, training={"epochs": 1})
        second = folder / name
        before = read_json(second / "metrics.json")["before"]
        assert before["loss"] == pytest.approx(best["loss"], rel=1e-5)
        plans = [read_json(run / "plan.json") for run in (first, second)]
        assert plans[0] == plans[1]
        assert [its.shape for its in tensors(first / "adapter").values()] == [
            its.shape for its in tensors(second / "adapter").values()
        ]
    first.rename(folder / "moved")  # which is of no account to what came of it
    assert command("eval", folder / "again").code == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "lora"}, "is a MSPLORA adapter, but the method is 'lora'"),
        ({"adapter": {"r": 16}}, "adapter.r is 16 and the adapter's 8"),
        ({"adapter": {"lora_alpha": 4}}, "adapter.lora_alpha is 4"),
        ({"adapter": {"target_modules": "all-linear"}}, "adapter.target_modules is 'all-linear'"),
        ({"adapter": {"target_modules": ["q_proj"]}}, "adapter.target_modules is ['q_proj']"),
        ({"adapter": {"use_dora": True}}, "adapter.use_dora is True"),
        ({"adapter": {"modules_to_save": ["lm_head"]}}, "and the run lm_head too"),
    ],
)
def test_an_adapter_of_another_shape_is_not_started_from(
    folder: Path, printed: str, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    content = config(folder, "refused", init_from=str(folder / "run"), **changes)
    result = command("train", write_config(tmp_path / "a.yaml", content))
    assert result.code == 1
    assert said in result.error
    assert not list(folder.glob("refused*"))


@pytest.mark.parametrize(("first", "then"), [("dora", "lora"), ("lora", "rslora")])
def test_a_lora_of_another_kind_is_not_started_from(
    folder: Path, printed: str, tmp_path: Path, first: str, then: str
) -> None:
    """The adapter decides, and a run's method would not say what was trained."""
    train(folder, f"{first}-first", method=first, training={"epochs": 1, "check_saved": False})
    content = config(folder, "refused", init_from=str(folder / f"{first}-first"), method=then)
    result = command("train", write_config(tmp_path / "a.yaml", content))
    assert result.code == 1
    assert f"Use method {first}, or start from another adapter" in result.error
    assert not list(folder.glob("refused*"))


def test_an_adapter_that_is_not_there_or_not_whole_is_not_started_from(
    folder: Path, printed: str, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    content = config(folder, "refused", init_from=str(folder / "rum"))
    result = command("train", write_config(tmp_path / "a.yaml", content))
    assert result.code == 1
    assert "Did you mean" in result.error
    train(folder, "whole-lora", method="lora", training={"epochs": 1})
    adapter = folder / "whole-lora/adapter"
    held = tensors(adapter)
    save_file(dict(list(held.items())[1:]), adapter / "adapter_model.safetensors")
    content = config(folder, "refused", init_from=str(adapter), method="lora")
    result = command("train", write_config(tmp_path / "a.yaml", content))
    assert result.code == 1
    assert "does not fit" in result.error
    assert next(iter(held)).partition(".lora_")[0] in result.error.replace(" ", "")
    assert command("eval", folder / "whole-lora").code == 1


@pytest.fixture(scope="module")
def half(folder: Path) -> Path:
    """The base in bfloat16, as most are published."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "base").to(torch.bfloat16)
    model.save_pretrained(folder / "half")
    hf.AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "half")
    return folder / "half"


@pytest.mark.parametrize("method", ["full", "msplora"])
def test_a_base_in_half_precision_is_measured_again_as_it_was(
    folder: Path, half: Path, method: str
) -> None:
    """What trains is in float32, in which a model that trains whole is saved."""
    whole = {"modules_to_save": ["lm_head", "norm"]} if method == "msplora" else {}
    name = f"half-{method}"
    train(folder, name, model=str(half), method=method, adapter=whole)
    best = read_json(folder / name / "metrics.json")["best"]
    measured = command("eval", folder / name, "--json").json()
    assert measured["loss"] == pytest.approx(best["loss"], rel=1e-9)
    saved = tensors(folder / name / ("model" if method == "full" else "adapter"))
    assert {its.dtype for its in saved.values()} == {torch.float32}
    if whole:
        before = tensors(half)["lm_head.weight"]
        (head,) = (its for key, its in saved.items() if "lm_head" in key)
        assert not torch.equal(head.bfloat16().float(), head)  # steps below bfloat16's
        assert not torch.equal(head, before.float())


def test_float16_of_a_gpu_becomes_float32_without_one(folder: Path) -> None:
    settings = make_settings(config(folder, "x"), "a test")
    for dtype, record in (("float16", None), ("auto", "float16")):
        settings.dtype = dtype
        assert saved_run._dtype(TaskRecord(settings, dtype=record)) == "float32"
    assert saved_run._dtype(TaskRecord(settings, dtype="bfloat16")) == "bfloat16"


def test_an_adapter_of_the_output_layer_is_refused(folder: Path) -> None:
    content = config(folder, "head", adapter={"target_modules": ["q_proj", "lm_head"]})
    result = command("train", write_config(folder / "head.yaml", content))
    assert result.code == 1
    assert "names the output layer, which task sft reads past its adapter" in result.error
    assert not list(folder.glob("head*/"))


def test_prompts_are_all_looked_at_before_the_first_is_answered(
    folder: Path, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[Any] = []
    monkeypatch.setattr(prediction, "continue_prompts", lambda *its: answered.append(its))
    rows = [{"prompt": "w1"}, {"prompt": "w1 " * 500}]
    result = command("predict", folder / "run", write_jsonl(tmp_path / "asked.jsonl", rows))
    assert result.code == 1
    assert "line 2: 501 tokens, and the model has" in result.error
    assert not answered


def test_rows_of_text_have_no_prompts_to_answer(folder: Path, printed: str, tmp_path: Path) -> None:
    """Of an adapter of which nothing is known but its base."""
    foreign = shutil.copytree(folder / "run/adapter", tmp_path / "foreign")
    (foreign / "task.json").unlink()
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "w1 w2"}])
    result = command("predict", foreign, rows)
    assert result.code == 1
    assert "holds plain text, which has no prompts to answer" in result.error


def test_a_template_with_a_byte_order_mark(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}", encoding="utf-8-sig")
    data = {"train": "x", "chat_template": str(tmp_path / "t.jinja")}
    settings = make_settings(config(folder, "x", data=data), "a test")
    assert load_tokenizer(settings).chat_template == "{{ messages }}"
    (tmp_path / "t.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_tokenizer(settings)


def test_rows_without_an_answer_are_counted_where_a_file_is_measured_on(
    folder: Path, printed: str, tmp_path: Path
) -> None:
    rows = [*answered_rows(3), {"prompt": "w1", "completion": " "}]
    given = write_jsonl(tmp_path / "given.jsonl", rows)
    found = command("eval", folder / "run", "--data", given, "--json").json()
    assert (found["rows"], found["empty"]) == (3, 1)


def test_no_server_is_named_for_what_none_takes(folder: Path) -> None:
    for method, served in (("lora", True), ("dora", False)):
        settings = make_settings(config(folder, "x", method=method), "a test")
        adapted = adapt(load_base(settings, None), settings)
        steps = [what for what, _ in next_steps(settings, folder / "x", adapted)]
        assert ("serve" in steps) == served


def test_a_stage_of_one_step_trains_where_the_rate_is_constant(folder: Path) -> None:
    stages = ["global", "mid", "local"]
    training = {"scheduler": "constant", "stages": stages, "max_steps": 3, "warmup_ratio": 0.06}
    out = train(folder, "constant", training=training).out
    assert "stage 3 of 3: local until step 3" in out


def test_a_launchers_precision_does_not_go_before_the_dtype(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `accelerate launch` sets it from its configuration, and a run before in this process."""
    losses = []
    for launched in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        name = f"launched-{launched}"
        train(folder, name, dtype="float32", training={"max_steps": 2})
        losses.append(json.loads((folder / name / "metrics.json").read_text())["best"]["loss"])
    assert losses[0] == losses[1]
