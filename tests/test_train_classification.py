"""Runs of a classifier with each method: what trains, what is kept, and that it is the best."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import msplora
from msplora.train.base_model import load_base
from msplora.train.data_classification import Classes
from msplora.train.methods import adapt
from msplora.train.run_trainer import settings_groups
from msplora.train.settings import Settings
from msplora.train.settings_file import make_settings
from runs import (
    labelled_rows,
    save_encoder,
    tensors,
    word_tokenizer,
    write_config,
    write_jsonl,
)
from runs import msplora as command

METHODS = ["msplora", "lora", "full", "frozen"]


@dataclass(frozen=True)
class Place:
    """A folder with a base, rows, and a config that names both."""

    folder: Path

    def config(self, **changes: Any) -> dict[str, Any]:
        training = {"epochs": 3, "batch_size": 8, "learning_rate": 0.02}
        content: dict[str, Any] = {
            "model": str(self.folder / "base"),
            "task": "classification",
            "output": str(self.folder / "run"),
            "data": {"train": str(self.folder / "rows.jsonl"), "validation_fraction": 0.25},
            "training": training | changes.pop("training", {}),
        }
        return content | changes

    def settings(self, **changes: Any) -> Settings:
        return make_settings(self.config(**changes), "a test")

    def train(self, name: str, **changes: Any) -> Path:
        out = self.folder / name
        file = write_config(self.folder / f"{name}.yaml", self.config(output=str(out), **changes))
        result = command("train", file)
        assert result.code == 0, result.err
        return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("classification")
    save_encoder(folder / "base")
    write_jsonl(folder / "rows.jsonl", labelled_rows(64))
    return Place(folder)


@pytest.fixture(scope="module")
def runs(place: Place) -> dict[str, Path]:
    return {method: place.train(method, method=method) for method in METHODS}


def metrics_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


CLASSES = Classes(("text",), "label", ("bad", "good"))
HEAD = {
    "bert.pooler.dense.weight",
    "bert.pooler.dense.bias",
    "classifier.weight",
    "classifier.bias",
}


def trainable_names(place: Place, method: str, **adapter: Any) -> tuple[Any, set[str]]:
    settings = place.settings(method=method, adapter=adapter)
    adapted = adapt(load_base(settings, CLASSES), settings)
    parameters = {n: p for n, p in adapted.model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in parameters.values()) == adapted.trainable.total
    assert all(p.dtype == torch.float32 for p in parameters.values())
    return adapted, set(parameters)


def in_base(names: set[str]) -> set[str]:
    """The names as the base model has them."""
    return {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for name in names
    }


@pytest.mark.parametrize("method", METHODS)
def test_exactly_what_should_train_does(place: Place, method: str) -> None:
    adapted, names = trainable_names(place, method)
    head = {name for name in names if in_base({name}) <= HEAD}
    if method == "full":
        base = load_base(place.settings(method="full"), CLASSES)
        assert names == {name for name, _ in base.model.named_parameters()}
        return
    assert in_base(head) == HEAD
    rest = names - head
    if method == "frozen":
        assert not rest
    elif method == "lora":
        # query and value of four layers, A and B of each
        assert len(rest) == 4 * 2 * 2
        assert all(".lora_A." in name or ".lora_B." in name for name in rest)
    else:
        factors = msplora.factors(adapted.model)
        ids = {id(factor) for a, b, _ in factors.values() for factor in (a, b)}
        parameters = dict(adapted.model.named_parameters())
        assert {id(parameters[name]) for name in rest} == ids


def test_parameter_numbers(place: Place) -> None:
    """16 wide, 4 layers, query and value, r = 8: worked out by hand."""
    head = (16 * 16 + 16) + (16 * 2 + 2)
    pyramid = 2 * (16 + 16) * (8 + 3 * 4 + 4 * 2)
    lora = 2 * (16 + 16) * 4 * 8
    counts = {
        method: adapt(load_base(settings, CLASSES), settings).trainable
        for method in METHODS
        for settings in [place.settings(method=method)]
    }
    base = counts["full"].total
    assert base == counts["full"].base == counts["msplora"].base
    assert (counts["msplora"].adapter, counts["msplora"].lora) == (pyramid, lora)
    assert (counts["lora"].adapter, counts["lora"].lora) == (lora, lora)
    assert [counts[method].head for method in METHODS] == [head, head, 0, head]
    assert counts["frozen"].total == head


def test_biases_and_more_modules_train_where_asked(place: Place) -> None:
    _, names = trainable_names(place, "msplora", bias="msplora_only")
    biases = {name for name in in_base(names) - HEAD if name.endswith(".bias")}
    assert len(biases) == 8
    assert all("query" in name or "value" in name for name in biases)
    _, names = trainable_names(place, "lora", modules_to_save=["LayerNorm"])
    norms = {name for name in in_base(names) if "LayerNorm" in name}
    assert len(norms) == 2 * (1 + 2 * 4)


def test_the_optimizer_gives_the_head_its_own_rate_and_biases_no_decay(place: Place) -> None:
    settings = place.settings(
        training={"weight_decay": 0.1, "head_learning_rate_factor": 0.5, "learning_rate": 1e-3},
        adapter={"modules_to_save": ["LayerNorm"]},
    )
    base = load_base(settings, CLASSES)
    model = adapt(base, settings).model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = set()
    for group in settings_groups(model, settings, base.head):
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            in_head = in_base({name}) <= HEAD
            assert group["lr"] == (5e-4 if in_head else 1e-3), name
            plain = name.endswith("bias") or "LayerNorm" in name
            assert group["weight_decay"] == (0.0 if plain else 0.1), name
    assert seen == {name for name, its in model.named_parameters() if its.requires_grad}


@pytest.mark.parametrize(
    "method", ["msplora", "lora", "vera", "adalora", "hydra", "full", "frozen"]
)
def test_the_head_may_have_a_rate_that_no_method_changes(place: Place, method: str) -> None:
    settings = place.settings(
        method=method,
        adapter={"target_modules": ["query", "value"]},
        training={"head_learning_rate": 2e-3, "learning_rate": 0.1},
    )
    base = load_base(settings, CLASSES)
    model = adapt(base, settings).model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {
        names[id(parameter)]: group["lr"]
        for group in settings_groups(model, settings, base.head)
        for parameter in group["params"]
    }
    heads = {name for name in rates if in_base({name}) <= HEAD}
    assert len(heads) == len(HEAD)
    for name, rate in rates.items():
        assert rate == pytest.approx(2e-3 if name in heads else 0.1), name


def test_all_methods_start_from_the_same_model_and_rows(runs: dict[str, Path]) -> None:
    before = [metrics_of(runs[method])["before"] for method in METHODS]
    assert all(entry == pytest.approx(before[0], abs=1e-6) for entry in before)
    assert before[0]["loss"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_what_must_not_train_is_untouched(place: Place, runs: dict[str, Path], method: str) -> None:
    saved = tensors(runs[method] / ("model" if method in ("full", "frozen") else "adapter"))
    base = tensors(place.folder / "base")
    encoder = {key: tensor for key, tensor in base.items() if key.startswith("bert.")}
    if method == "full":
        assert any(not torch.equal(saved[key], tensor) for key, tensor in encoder.items())
    elif method == "frozen":
        assert all(torch.equal(saved[key], tensor) for key, tensor in encoder.items())
    else:
        assert not {key.removeprefix("base_model.model.") for key in saved} & set(encoder)
        assert all(tensor.abs().sum() > 0 for key, tensor in saved.items() if "lora_B" in key)


@pytest.mark.parametrize("method", METHODS)
def test_eval_gives_the_number_that_the_run_reports_for_its_best_epoch(
    runs: dict[str, Path], method: str
) -> None:
    found = command("eval", runs[method], "--json").json()
    metrics = metrics_of(runs[method])
    best = metrics["best"]
    assert metrics["metric_for_best"] == "accuracy"
    assert best in metrics["evaluations"]
    assert best["accuracy"] == max(entry["accuracy"] for entry in metrics["evaluations"])
    assert found["accuracy"] == best["accuracy"]
    assert found["loss"] == pytest.approx(best["loss"], rel=1e-6)
    assert found["rows"] == 16
    assert found["data"] == "held out by the run"


def test_the_best_epoch_is_kept_although_later_ones_are_worse(place: Place) -> None:
    """By loss, at a rate so high that it does not fall every epoch: the kept is not the last."""
    run = place.train(
        "unsteady",
        training={"epochs": 6, "learning_rate": 0.3, "metric_for_best": "loss", "save_limit": 1},
    )
    metrics = metrics_of(run)
    losses = [entry["loss"] for entry in metrics["evaluations"]]
    assert len(losses) == 6
    assert losses.index(min(losses)) < 5
    assert metrics["best"] == metrics["evaluations"][losses.index(min(losses))]
    found = command("eval", run, "--json").json()
    assert found["loss"] == pytest.approx(min(losses), rel=1e-6)


def test_predict_agrees_with_the_model_loaded_by_peft(
    place: Place, runs: dict[str, Path], tmp_path: Path
) -> None:
    rows = [{"text": row["text"]} for row in labelled_rows(7)]
    file = write_jsonl(tmp_path / "new.jsonl", rows)
    run = runs["msplora"]
    lines = command("predict", run, file, "--json", "--batch-size", 3).out.splitlines()
    found = [json.loads(line) for line in lines]
    base = hf.AutoModelForSequenceClassification.from_pretrained(place.folder / "base")
    model = peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(run / "adapter")
    for number, (row, prediction) in enumerate(zip(rows, found, strict=True), 1):
        with torch.no_grad():
            odds = model(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(-1)[0]
        assert prediction["row"] == number
        assert prediction["prediction"] == ("bad", "good")[int(odds.argmax())]
        expected = {"bad": odds[0].item(), "good": odds[1].item()}
        assert prediction["probabilities"] == pytest.approx(expected, abs=1e-5)
    table = command("predict", run, file).out.splitlines()
    assert table[0].split("\t") == [
        "row",
        "prediction",
        "probability of bad",
        "probability of good",
    ]
    assert [line.split("\t")[1] for line in table[1:]] == [its["prediction"] for its in found]
    write_jsonl(file, [*rows[:2], {"text": "w1 " * 40}])
    cut = command("predict", run, file)
    assert len(cut.out.splitlines()) == 4
    assert "1 of 3 (33.3 %) rows have more than 32 tokens, and were cut" in cut.error


def test_eval_of_another_file_is_counted_by_hand(runs: dict[str, Path], tmp_path: Path) -> None:
    rows = labelled_rows(9)
    file = write_jsonl(tmp_path / "other.jsonl", rows)
    lines = command("predict", runs["lora"], file, "--json").out.splitlines()
    predicted = [json.loads(line) for line in lines]
    right = [its["prediction"] == row["label"] for its, row in zip(predicted, rows, strict=True)]
    loss = [
        -math.log(its["probabilities"][row["label"]])
        for its, row in zip(predicted, rows, strict=True)
    ]
    found = command("eval", runs["lora"], "--data", file, "--json").json()
    assert found["accuracy"] == pytest.approx(sum(right) / 9)
    assert found["loss"] == pytest.approx(sum(loss) / 9, rel=1e-5)


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_a_converted_classifier_keeps_its_classes_and_evaluates_alike(
    runs: dict[str, Path], tmp_path: Path, to: str
) -> None:
    run, out = runs["msplora"], tmp_path / to
    done = command("convert", run, out, "--to", to)
    assert "vllm" not in done.out  # which serves language models
    if to == "merged":
        config = json.loads((out / "config.json").read_text())
        assert config["id2label"] == {"0": "bad", "1": "good"}
    expected = command("eval", run, "--json").json()
    found = command("eval", out, "--json").json()
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["accuracy"] == expected["accuracy"]


def test_the_model_card_loads_three_classes(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python that the card shows is run: the base alone would get a head of two outputs."""
    rows = [row | {"label": "abc"[n % 3]} for n, row in enumerate(labelled_rows(24))]
    data = {"train": str(write_jsonl(tmp_path / "three.jsonl", rows))}
    for method in ("msplora", "lora"):
        run = place.train(f"three-{method}", data=data, method=method, training={"epochs": 1})
        card = (run / "README.md").read_text()
        code = card.partition("```python\n")[2].partition("```")[0]
        monkeypatch.chdir(run)
        names: dict[str, Any] = {}
        exec(code, names)
        assert names["model"].get_base_model().num_labels == 3
        for name, value in metrics_of(run)["best"].items():
            if name in ("loss", "accuracy"):
                assert f"{value:.4f}" in card


def test_an_encoder_decoder_with_a_head_trains_to_its_end(place: Place, tmp_path: Path) -> None:
    """BART keeps the number of classes in its config alone, and reads its last </s>."""
    config = hf.BartConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=64,
        max_position_embeddings=32, pad_token_id=1, eos_token_id=2, bos_token_id=0,
        forced_eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    hf.BartModel(config).save_pretrained(tmp_path / "bart")
    words = word_tokenizer("<s>", "<pad>", "</s>", "<unk>", opening="<s>", closing="</s>")
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(tmp_path / "bart")
    rows = [row | {"label": "abc"[n % 3]} for n, row in enumerate(labelled_rows(24))]
    data = {"train": str(write_jsonl(tmp_path / "three.jsonl", rows))}
    run = place.train("bart", model=str(tmp_path / "bart"), data=data, training={"epochs": 1})
    assert "num_labels=3" in (run / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mrpc", "cola", "stsb"])
def test_glue_by_name(place: Place, tmp_path: Path, task: str) -> None:
    """The official forms, end to end; eval and predict read the task's own files too."""
    texts = [row["text"] for row in labelled_rows(24)]
    header, line = {
        "mrpc": (
            "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
            lambda n: f'{n % 2}\t1\t2\t{texts[n]} "\t{texts[n]}\n',
        ),
        "cola": ("", lambda n: f"gj04\t{n % 2}\t\t{texts[n]}\n"),
        "stsb": (
            "index\tsentence1\tsentence2\tscore\n",
            lambda n: f"{n}\t{texts[n]}\t{texts[n]}\t{n % 6 * 0.8:.3f}\n",
        ),
    }[task]
    for name, numbers in (("train", range(16)), ("dev", range(16, 24))):
        text = header + "".join(line(number) for number in numbers)
        (tmp_path / f"{name}.tsv").write_text(text, encoding="utf-8")
    data = {"glue": task, "path": str(tmp_path)}
    run = place.train(f"glue-{task}", data=data, training={"epochs": 1})
    metrics = metrics_of(run)
    names = {
        "mrpc": {"accuracy", "f1"},
        "cola": {"matthews_correlation", "accuracy"},
        "stsb": {"pearson", "spearman"},
    }[task]
    assert names | {"loss", "epoch", "step"} == set(metrics["best"])
    found = command("eval", run, "--data", tmp_path / "dev.tsv", "--json").json()
    assert found["rows"] == 8
    for name in names:
        assert found[name] == pytest.approx(metrics["best"][name])
    predicted = command("predict", run, tmp_path / "dev.tsv", "--json").out.splitlines()
    assert len(predicted) == 8
    if task == "stsb":
        assert isinstance(json.loads(predicted[0])["prediction"], float)


@pytest.mark.parametrize("method", ["msplora", "full"])
def test_half_precision_trains_on_any_machine_and_keeps_what_trains_in_single(
    place: Place, method: str
) -> None:
    run = place.train(f"half-{method}", dtype="bfloat16", method=method, training={"epochs": 1})
    best = metrics_of(run)["best"]
    found = command("eval", run, "--json").json()
    assert found["loss"] == pytest.approx(best["loss"], rel=1e-5)
    assert found["accuracy"] == best["accuracy"]
    saved = tensors(run / ("model" if method == "full" else "adapter"))
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_a_tokenizer_that_cannot_pad_is_refused_before_the_first_step(
    place: Place, tmp_path: Path
) -> None:
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=word_tokenizer("<unk>"))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = place.config(tokenizer=str(tmp_path / "tokenizer"), output=str(tmp_path / "run"))
    result = command("train", write_config(tmp_path / "a.yaml", config))
    assert result.code == 1
    assert "no token for padding" in result.error
    assert not list(tmp_path.glob("run*"))


# Bases that are not whole.


def without(place: Place, folder: Path, lost: str) -> Path:
    shutil.copytree(place.folder / "base", folder)
    file = folder / "model.safetensors"
    held = load_file(file)
    assert lost in held
    save_file({key: its for key, its in held.items() if key != lost}, file, {"format": "pt"})
    return folder


def test_a_base_that_lacks_a_weight_is_refused_and_named(place: Place, tmp_path: Path) -> None:
    lost = "bert.encoder.layer.1.attention.self.query.weight"
    base = without(place, tmp_path / "base", lost)
    config = place.config(model=str(base), output=str(tmp_path / "run"))
    result = command("train", write_config(tmp_path / "a.yaml", config))
    assert result.code == 1
    assert "1 weights of the base are missing" in result.error
    assert lost in result.error
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.unfinished").exists()


def test_a_head_of_other_classes_is_new_and_said_to_be(place: Place, tmp_path: Path) -> None:
    settings = place.settings()
    saved = load_base(settings, Classes(("text",), "label", ("a", "b", "c"))).model
    saved.save_pretrained(tmp_path)
    tokenizer = hf.AutoTokenizer.from_pretrained(place.folder / "base")
    tokenizer.save_pretrained(tmp_path)
    settings = place.settings(model=str(tmp_path))
    base = load_base(settings, CLASSES)
    assert base.model.classifier.out_features == 2
    assert any("new" in note and "classifier" in note for note in base.notes)
    assert base.model.config.id2label == {0: "bad", 1: "good"}
    three = load_base(settings, Classes(("text",), "label", ("a", "b", "c")))
    assert any("head taken from the checkpoint" in note for note in three.notes)
    assert torch.equal(three.model.classifier.weight, saved.classifier.weight)
