"""A run that starts from an adapter: it is for the same, labels alike, and stays the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from peft import LoraConfig
from safetensors.torch import save_file
from torch import zeros

from msplora import MSPLoraConfig
from msplora.errors import AdapterFileError, ConfigError, MSPLoraError
from msplora.folders import OutputError
from msplora.train import inputs
from msplora.train.base_model import load_tokenizer
from msplora.train.classification_rows import labelled_data
from msplora.train.data_classification import Classes
from msplora.train.evaluation import pair_judge
from msplora.train.init_from import in_its_classes, notes_on_start, start_checksums
from msplora.train.run import prepare_job
from msplora.train.run_folder import INPUTS, RunFolder, RunFolderError
from msplora.train.saved_run import SavedRun
from msplora.train.settings import Settings
from msplora.train.settings_file import make_settings
from msplora.train.task_record import TaskRecord
from runs import labelled_rows, word_tokenizer, write_jsonl

TEMPLATE = "{% for message in messages %}w1 {{ message.content }} </s>{% endfor %}"


def settings_of(here: Path, task: str = "sft", **changes: Any) -> Settings:
    data = {"train": str(here / "rows.jsonl"), **changes.pop("data", {})}
    content = {"model": "m", "task": task, "output": str(here / "run"), "data": data}
    return make_settings(content | {"init_from": str(here / "first")} | changes, "a test")


def adapter(
    here: Path, task: str | None = "sft", labels: tuple[str, ...] = (), kind: Any = None
) -> Path:
    """The files of an adapter in a run's folder; without a task, as another program leaves it."""
    folder = here / "first/adapter"
    folder.mkdir(parents=True)
    of_peft = {"classification": "SEQ_CLS", "image-classification": None}.get(task or "", kind)
    MSPLoraConfig(base_model_name_or_path="m", task_type=of_peft).save_pretrained(str(folder))
    save_file({"a": zeros(2)}, folder / "adapter_model.safetensors")
    if task:
        classes = Classes(("text",), "label", labels) if labels else None
        its = make_settings(
            {"model": "m", "task": task, "output": "o", "data": {"train": "t"}}, "a test"
        )
        TaskRecord(its, classes, () if labels else ("prompt-completion",)).save(folder)
    return folder


# What it was trained for.


@pytest.mark.parametrize(
    ("its", "kind", "task", "said"),
    [
        ("sft", None, "classification", "for a language model, and task 'classification'"),
        ("classification", None, "sft", "for a classifier of texts, and task 'sft'"),
        ("image-classification", None, "classification", "for a classifier of images"),
        (None, "SEQ_CLS", "dpo", "for a classifier of texts, and task 'dpo'"),
        (None, "CAUSAL_LM", "image-classification", "for a language model"),
    ],
)
@pytest.mark.parametrize("method", ["msplora", "lora"])
def test_an_adapter_for_something_else_is_refused_before_anything_is_read(
    its: str | None, kind: Any, task: str, said: str, method: str, tmp_path: Path
) -> None:
    adapter(tmp_path, its, ("a", "b") if its and "class" in its else (), kind)
    with pytest.raises(ConfigError, match="Start from an adapter of the same kind") as refused:
        prepare_job(settings_of(tmp_path, task, method=method))
    assert said in str(refused.value)


@pytest.mark.parametrize(("its", "kind"), [("sft", None), (None, "CAUSAL_LM"), (None, None)])
def test_preferences_may_start_from_any_language_model(
    its: str | None, kind: Any, tmp_path: Path
) -> None:
    adapter(tmp_path, its, kind=kind)
    with pytest.raises(MSPLoraError, match="does not exist"):  # on to the data, which are not there
        prepare_job(settings_of(tmp_path, "dpo"))


def test_another_base_is_named_whatever_the_method(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    LoraConfig(base_model_name_or_path="other/base").save_pretrained(str(folder))
    for method in ("lora", "msplora"):
        notes = notes_on_start(settings_of(tmp_path, method=method), None, None)
        assert any("names 'other/base' as its base, and the run's is 'm'" in its for its in notes)
    LoraConfig(base_model_name_or_path="m").save_pretrained(str(folder))
    assert len(notes_on_start(settings_of(tmp_path), None, None)) == 1


# Its classes.


def test_labels_are_those_of_the_adapters_head_in_its_order(tmp_path: Path) -> None:
    adapter(tmp_path, "classification", ("good", "ugly", "bad"))
    rows = labelled_rows(20)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    data = labelled_data(settings_of(tmp_path, "classification"))
    assert data.classes.labels == ("good", "ugly", "bad")
    label_of = {row["text"]: row["label"] for row in rows}
    for example in (*data.train, *data.held_out):
        assert data.classes.labels[int(example.label or 0)] == label_of[example.texts[0]]


@pytest.mark.parametrize(
    ("its", "data", "said"),
    [
        (("good", "bad"), {"labels": ["bad", "good"]}, "tells good, bad apart, in this order"),
        (("ham", "spam"), {}, "tells ham, spam apart, in this order, and the run's data have bad"),
        (("good", "bad"), {"regression": True}, "the run's data have numbers"),
    ],
)
def test_other_classes_are_refused(
    its: tuple[str, ...], data: dict[str, Any], said: str, tmp_path: Path
) -> None:
    adapter(tmp_path, "classification", its)
    rows = labelled_rows(20, ("0", "1") if "regression" in data else ("bad", "good"))
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError) as refused:
        labelled_data(settings_of(tmp_path, "classification", data=data))
    assert said in str(refused.value)


def test_classes_that_are_not_known_are_said_to_be_taken_for_granted(tmp_path: Path) -> None:
    adapter(tmp_path, None, kind="SEQ_CLS")
    settings = settings_of(tmp_path, "classification")
    classes = Classes(("text",), "label", ("bad", "good"))
    assert in_its_classes(settings, classes, [1])[1] == [[1]]
    model = hf.BertForSequenceClassification(
        hf.BertConfig(
            vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=4, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
        )
    )  # fmt: skip
    assert any("in this order: bad, good" in its for its in notes_on_start(settings, model, None))


# Its tokenizer.


def save_tokenizer(folder: Path, template: str | None = None) -> Any:
    words = word_tokenizer("<unk>", "<s>", "</s>")
    found = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", chat_template=template
    )
    found.save_pretrained(str(folder))
    return found


def test_the_chat_template_is_the_adapters_unless_another_is_named(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    save_tokenizer(tmp_path / "base", "{{ messages[0].content }}")
    save_tokenizer(folder, TEMPLATE)
    (tmp_path / "named.jinja").write_text("w2")
    plain = settings_of(tmp_path, model=str(tmp_path / "base"))
    its = load_tokenizer(plain)
    assert its.chat_template == TEMPLATE
    assert not any("another" in note for note in notes_on_start(plain, None, its))
    changes: dict[str, Any]
    for changes, expected in (
        ({"tokenizer": str(tmp_path / "base")}, "{{ messages[0].content }}"),
        ({"data": {"chat_template": str(tmp_path / "named.jinja")}}, "w2"),
    ):
        settings = settings_of(tmp_path, model=str(tmp_path / "base"), **changes)
        found = load_tokenizer(settings)
        assert found.chat_template == expected
        assert any(
            "another chat template than" in its for its in notes_on_start(settings, 0, found)
        )
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(plain).chat_template == "{{ messages[0].content }}"


# Whether it is still the same.


@pytest.mark.parametrize("changes", [{}, {"output": "first"}, {"output": "first/adapter"}])
def test_a_run_does_not_replace_what_it_starts_from(
    changes: dict[str, str], tmp_path: Path
) -> None:
    adapter(tmp_path)
    outputs = {key: str(tmp_path / value) for key, value in changes.items()}
    settings = settings_of(tmp_path, **outputs)
    if not changes:
        RunFolder(settings)
        return
    for name in ("config.yaml", "run.json"):
        (Path(settings.output) / name).write_text("")  # a run's folder, which --force replaces
    with pytest.raises(OutputError, match="which it is made from"):
        RunFolder(settings, force=True)


def test_a_run_is_not_resumed_from_another_adapter(tmp_path: Path) -> None:
    weights = adapter(tmp_path) / "adapter_model.safetensors"
    write_jsonl(tmp_path / "rows.jsonl", labelled_rows(3))
    settings = settings_of(tmp_path)
    first = RunFolder(settings)
    assert first.begin() == []
    first.release()
    RunFolder(settings, resume=True)
    save_file({"a": zeros(3)}, weights)
    with pytest.raises(RunFolderError) as refused:
        RunFolder(settings, resume=True)
    assert f"began with other files: {weights} changed since" in str(refused.value)
    # A run that an older msplora began knows only of its data.
    file = first.working / INPUTS
    data = {name: its for name, its in json.loads(file.read_text()).items() if "rows" in name}
    file.write_text(json.dumps(data))
    old = RunFolder(settings, resume=True)
    assert any("cannot be told" in note for note in old.begin())
    old.release()
    (tmp_path / "rows.jsonl").write_text("{}")
    assert inputs.changed(data, settings) == [str(tmp_path / "rows.jsonl")]


def test_preferences_are_not_compared_with_another_adapter(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    settings = settings_of(tmp_path, "dpo")
    record = TaskRecord(settings, forms=("prompt-completion",), start=start_checksums(settings))
    record.save(tmp_path)
    run = SavedRun(tmp_path, None, None, TaskRecord.load(tmp_path))  # type: ignore[arg-type]
    assert run.record.start == record.start
    (folder / "README.md").write_text("It may be described anew.")
    with pytest.raises(AttributeError):  # on to the model, which is not there
        pair_judge(run, [], 1)
    save_file({"a": zeros(3)}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors changed since"):
        pair_judge(run, [], 1)
    old = SavedRun(tmp_path, None, None, TaskRecord(settings, forms=("prompt-completion",)))  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        pair_judge(old, [], 1)
    (folder / "adapter_config.json").unlink()
    for its in (run, old):
        with pytest.raises(AdapterFileError, match="compared with the adapter it started from"):
            pair_judge(its, [], 1)
