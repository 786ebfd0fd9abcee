"""The config of a run: what a file and the flags over it mean, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from msplora.errors import ConfigError
from msplora.train.other_names import OTHER_NAMES
from msplora.train.settings import Settings
from msplora.train.settings_file import known_keys, make_settings, read_settings, write_settings
from msplora.train.settings_methods import METHOD_SECTIONS

MINIMAL = "model: some/model\ntask: sft\noutput: out\ndata: {train: rows.jsonl}\n"
CLASSIFIER = MINIMAL.replace("sft", "classification")


def read(folder: Path, text: str, *overrides: str, **flags: Any) -> Settings:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return read_settings(file, overrides, flags)


def refusal(folder: Path, text: str, *overrides: str, **flags: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, text, *overrides, **flags)
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("1e-4", 1e-4),
        ("5E-3", 5e-3),
        ("1.5e-4", 1.5e-4),
        (".5e-3", 5e-4),
        ("1e0", 1.0),
        ("2e+1", 20.0),
        ("0.01", 0.01),
        ("1", 1.0),
    ],
)
def test_numbers_are_numbers_in_the_file_and_on_the_command_line(
    tmp_path: Path, written: str, number: float
) -> None:
    in_file = read(tmp_path, f"{MINIMAL}training: {{learning_rate: {written}}}")
    assert in_file.training.learning_rate == number
    by_flag = read(tmp_path, MINIMAL, f"training.learning_rate={written}")
    assert by_flag.training.learning_rate == number


def test_words_that_look_like_numbers_are_left_alone(tmp_path: Path) -> None:
    settings = read(tmp_path, MINIMAL.replace("output: out", "output: run-1e-4"))
    assert settings.output == "run-1e-4"


def test_flags_override_set_and_set_overrides_the_file(tmp_path: Path) -> None:
    text = f"{MINIMAL}seed: 1\nmethod: lora\ntraining: {{epochs: 5, batch_size: 4}}"
    settings = read(
        tmp_path, text, "training.epochs=2", "seed=2", "method=full", seed=3, method=None
    )
    assert (settings.training.epochs, settings.training.batch_size) == (2, 4)
    assert (settings.seed, settings.method) == (3, "full")


def test_it_evaluates_as_many_rows_as_it_trains_on_unless_told(tmp_path: Path) -> None:
    assert read(tmp_path, MINIMAL).training.eval_batch_size == 16
    assert read(tmp_path, MINIMAL, "training.batch_size=3").training.eval_batch_size == 3
    told = read(tmp_path, MINIMAL, "training.batch_size=3", "training.eval_batch_size=5")
    assert (told.training.batch_size, told.training.eval_batch_size) == (3, 5)
    assert "eval_batch_size" not in refusal(tmp_path, f"{MINIMAL}training: {{batch_size: 0}}")


def test_set_reaches_sections_that_the_file_lacks_or_leaves_empty(tmp_path: Path) -> None:
    assert read(tmp_path, MINIMAL, "adapter.r=16").adapter.r == 16
    assert read(tmp_path, f"{MINIMAL}adapter:\n", "adapter.r=16").adapter.r == 16
    assert read(tmp_path, MINIMAL, "data.columns.prompt=q").data.columns == {"prompt": "q"}
    listed = read(tmp_path, MINIMAL, "adapter.target_modules=[q_proj, v_proj]")
    assert listed.adapter.target_modules == ["q_proj", "v_proj"]


def test_a_section_of_which_everything_is_commented_out_holds_the_defaults(tmp_path: Path) -> None:
    settings = read(tmp_path, f"{MINIMAL}training:\n  # epochs: 5\nadapter:\n")
    assert settings == read(tmp_path, MINIMAL)


def test_classes_may_be_written_as_numbers(tmp_path: Path) -> None:
    assert read(tmp_path, CLASSIFIER, "data.labels=[0, 1]").data.labels == ["0", "1"]
    # YAML's `yes` is a truth value; the user must say which word was meant.
    assert "valid string" in refusal(tmp_path, CLASSIFIER, "data.labels=[yes, no]")


def test_anchors_and_merge_keys_of_yaml_work(tmp_path: Path) -> None:
    text = f"{MINIMAL}adapter: &a {{r: 8}}\ntraining:\n  <<: {{epochs: 2}}\n  batch_size: 4\n"
    settings = read(tmp_path, text)
    assert (settings.training.epochs, settings.training.batch_size) == (2, 4)


def test_what_is_written_reads_as_the_same(tmp_path: Path) -> None:
    settings = read(
        tmp_path, MINIMAL, "training.learning_rate=1e-5", "adapter.ranks=[8, 4]", "seed=7"
    )
    write_settings(settings, tmp_path / "again.yaml")
    assert read_settings(tmp_path / "again.yaml") == settings


def test_words_that_look_like_numbers_are_written_as_words(tmp_path: Path) -> None:
    words = ["1e3", "12E4", "1_0e-2", ".5e1", "1e-4", "0x10", "1:30", "yes", "007", "1.5"]
    settings = read(tmp_path, MINIMAL)
    settings.task, settings.data.labels, settings.revision = "classification", words, "1234e56"
    write_settings(settings, tmp_path / "again.yaml")
    again = read_settings(tmp_path / "again.yaml")
    assert (again.data.labels, again.revision) == (words, "1234e56")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("modle", "model"),
        ("training.learning_rte", "training.learning_rate"),
        ("data.validaton", "data.validation"),
        ("adapter.rank", "adapter.ranks"),
        ("learning_rate", "training.learning_rate"),  # right name, wrong place
        ("training.r", "adapter.r"),
        ("training.zzz", "learning_rate"),  # like none, so those of the section are listed
        ("training.lr", "training.learning_rate"),  # another tool's name
        ("cutoff_len", "data.max_length"),
        ("learning_rte", "training.learning_rate"),
        ("training.warmup_steps", "training.warmup_ratio"),
        ("adapter.r_parallel", "hydra.r_parallel"),
        ("elalor", "elalora"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(tmp_path: Path, key: str, meant: str) -> None:
    message = refusal(tmp_path, MINIMAL, f"{key}=1")
    assert f"unknown key {key!r}" in message
    assert meant in message.partition(repr(key))[2]


def test_names_of_other_tools_lead_to_keys_that_there_are() -> None:
    assert set(OTHER_NAMES.values()) <= set(known_keys())
    # The keys of a method's own section are its alone, and come after other tools' names.
    shared = [key for key in known_keys() if key.partition(".")[0] not in METHOD_SECTIONS]
    assert not OTHER_NAMES.keys() & {key.rpartition(".")[2] for key in shared}


def test_every_known_key_is_accepted_where_it_is_listed() -> None:
    """The keys that errors suggest are those that the model has."""
    keys = known_keys()
    assert {"training", "training.epochs", "data.too_long", "adapter.split_alpha"} <= set(keys)
    assert len(keys) == len(set(keys))
    for key in keys:
        content: dict[str, Any] = {}
        *sections, last = key.split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = object()  # of no valid type anywhere
        with pytest.raises(ConfigError) as caught:
            make_settings(content, "a test")
        assert "unknown key" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "holds a list"),
        ("model: [unclosed\n", "not valid YAML"),
        ("model: a\n\tb: c\n", "not valid YAML"),
        ("model: a\nmodel: b\n", "'model' stands twice, in lines 1 and 2"),
        ("[a, b]: c\n", "a key must be a word"),
        ("1: 2\n", "1"),
        ("model: \x00\n", "not valid YAML"),
        ("task: sft\noutput: out\n", "'model' is missing"),
        (MINIMAL.replace("sft", "sfd"), "Did you mean 'sft'?"),
        (f"{MINIMAL}method: msplor", "Did you mean 'msplora'?"),
        (f"{MINIMAL}training: 5", "training = 5"),
        (f"{MINIMAL}training: {{epochs: many}}", "training.epochs = 'many'"),
        (f"{MINIMAL}training: {{epochs: 0}}", "training.epochs = 0: it should be greater than 0"),
        (f"{MINIMAL}training: {{batch_size: 1.5}}", "training.batch_size = 1.5"),
        (f"{MINIMAL}training: {{batch_size: yes}}", "batch_size = True: a number belongs here"),
        (f"{MINIMAL}training: {{learning_rate: true}}", "a number belongs here, and true is none"),
        (f"{MINIMAL}training: {{epochs: .inf}}", "training.epochs = inf: it should be a finite"),
        (f"{MINIMAL}adapter: {{alphas: [.nan, 1, 1]}}", "adapter.alphas[0] = nan: it should be a"),
        (f"{MINIMAL}seed: 4294967296", "seed = 4294967296: it should be less than 4294967296"),
        (
            f"{MINIMAL}training: {{stages: [mid, {{levels: [global], share: 0}}]}}",
            "training.stages[1].share = 0: it should be greater than 0",
        ),
        (
            f"{MINIMAL}training: {{stages: [{{levels: global}}]}}",
            "training.stages[0].levels = 'global': it should be a valid list",
        ),
        (
            f"{MINIMAL}training: {{stages: [{{share: 1}}]}}",
            "'training.stages[0].levels' is missing",
        ),
        (
            f"{MINIMAL}training: {{stages: [{{levls: [mid]}}]}}",
            "unknown key 'training.stages[0].levls'. Did you mean 'levels'?",
        ),
        (
            f"{MINIMAL}training: {{stages: [{{levels: [mid], epochs: 1}}]}}",
            "unknown key 'training.stages[0].epochs'. Known here: levels, share.",
        ),
        (
            f"{MINIMAL}training: {{level_learning_rate_factors: {{local: 0}}}}",
            "training.level_learning_rate_factors.local = 0: it should be greater than 0",
        ),
        (f"{MINIMAL}adapter: {{target_modules: 5}}", "adapter.target_modules = 5: it should be"),
        (f"{MINIMAL}adapter: {{ranks: [8, a]}}", "adapter.ranks[1] = 'a': it should be"),
        (f"{MINIMAL}data: {{train: a}}", "'data' stands twice"),
        (MINIMAL.replace("{train: rows.jsonl}", "{}"), "found none of them"),
        (MINIMAL.replace("{train:", "{hub: a, train:"), "found data.train and data.hub"),
        (MINIMAL.replace("{train:", "{glue: mrpc, path: a, text_columns: [x], x:"), "unknown key"),
        (f"{MINIMAL}method: frozen", "trains a classifier's head only"),
        (f"{CLASSIFIER}training: {{packing: true}}", "training.packing = True is for task 'sft'"),
        (MINIMAL.replace("{train:", "{regression: true, train:"), "is for task 'classification'"),
        (CLASSIFIER.replace("{train:", "{labels: [yes, no], train:"), "put them in quotes"),
        (f"{CLASSIFIER}method: full\ninit_from: somewhere", "starts from an adapter"),
        (MINIMAL.replace("{train:", "{validation_split: a, train:"), "read with data.hub"),
        (
            MINIMAL.replace("{train:", "{hub_config: a, train:"),
            "hub_config = 'a' is read with data.hub",
        ),
        (MINIMAL.replace("{train:", "{path: a, train:"), "path = 'a' is read with data.glue"),
        (f"{MINIMAL}training: {{scheduler: constant, warmup_ratio: 0.5}}", "constant_with_warmup"),
        (f"{MINIMAL}training: {{scheduler: polynomial, learning_rate: 1e-7}}", "falls to 1e-07"),
        (
            f"{CLASSIFIER}training: {{head_learning_rate: 1e-3, head_learning_rate_factor: 0.5}}",
            "training.head_learning_rate = 0.001 is the head's rate itself",
        ),
        (f"{MINIMAL}training: {{head_learning_rate: 1e-3}}", "is for task 'classification'"),
        (
            f"{MINIMAL}devices: {{strategy: zero2}}\ntraining: {{stages: [mid]}}",
            "training.stages freezes levels, and devices.strategy = 'zero2'",
        ),
        (
            f"{MINIMAL}devices: {{strategy: zero3}}\ntraining: {{frozen_levels: [mid]}}",
            "training.frozen_levels freezes levels, and devices.strategy = 'zero3'",
        ),
        (CLASSIFIER.replace("{train:", "{validation_fraction: 0, train:"), "needs held-out rows"),
        (CLASSIFIER.replace("{train:", "{labels: [a, b], regression: true, train:"), "is set"),
        (CLASSIFIER.replace("{train:", "{labels: [a, b, a], train:"), "names 'a' more than once"),
        (CLASSIFIER.replace("train: rows.jsonl", "glue: mrpc"), "needs data.path"),
        (CLASSIFIER.replace("train: rows.jsonl", "glue: mprc, path: a"), "Did you mean 'mrpc'?"),
        (MINIMAL.replace("train: rows.jsonl", "glue: mrpc, path: a"), "not 'sft'"),
        (
            CLASSIFIER.replace("train: rows.jsonl", "glue: mrpc, path: a, labels: [a, b]"),
            "decides data.labels by itself",
        ),
    ],
)
def test_what_no_run_can_do_is_refused_with_the_reason(
    tmp_path: Path, text: str, said: str
) -> None:
    message = refusal(tmp_path, text)
    assert said in message
    assert "run.yaml" in message  # which file


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, f"{MINIMAL}seed: x\ntraining: {{epoch: 3, batch_size: 0}}")
    for key in ("seed", "training.epoch", "training.batch_size"):
        assert key in message


@pytest.mark.parametrize("override", ["training.epochs", "=3", "seed.x=1", "seed=[1"])
def test_a_malformed_set_is_refused(tmp_path: Path, override: str) -> None:
    text = f"{MINIMAL}seed: 1"
    assert "--set" in refusal(tmp_path, text, override)


def test_what_a_set_value_breaks_names_the_set(tmp_path: Path) -> None:
    assert "with --set: seed = 'x'" in refusal(tmp_path, f"{MINIMAL}seed: 1", "seed=x")
    assert "--set" not in refusal(tmp_path, f"{MINIMAL}seed: x")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_settings(tmp_path / "train.yaml")
    for name in ("minilm-rte-cpu", "minilm-rte-cpu.yaml"):
        copy = "a recipe of that name.*msplora recipes copy minilm-rte-cpu$"
        with pytest.raises(ConfigError, match=copy):
            read_settings(name)
    with pytest.raises(ConfigError, match=r"does not exist.*Did you mean.*train\.yaml"):
        read_settings(tmp_path / "trian.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        read_settings(tmp_path)
