"""A run is whole or not there: interruptions, resuming, forcing, and everything that is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from msplora.train.progress import ShowProgress
from msplora.train.run_folder import _WRITTEN, RunFolder, RunFolderError
from msplora.train.settings_file import make_settings
from runs import (
    Result,
    answered_rows,
    labelled_rows,
    same,
    save_decoder,
    save_encoder,
    tensors,
    tree,
    write_config,
    write_jsonl,
)
from runs import (
    msplora as command,
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    save_encoder(folder / "encoder", positions=16)
    save_decoder(folder / "decoder", attention_dropout=0.1)
    write_jsonl(folder / "labelled.jsonl", labelled_rows(40))
    write_jsonl(folder / "answered.jsonl", answered_rows(40))
    return folder


def config(bases: Path, task: str = "sft", **changes: Any) -> dict[str, Any]:
    classifies = task == "classification"
    training = {"epochs": 3, "batch_size": 8, "learning_rate": 0.01, "logging_steps": 1}
    data = {"train": str(bases / ("labelled.jsonl" if classifies else "answered.jsonl"))}
    content: dict[str, Any] = {
        "model": str(bases / ("encoder" if classifies else "decoder")),
        "task": task,
        "output": "run",
        "adapter": {"lora_dropout": 0.1},
        "training": training | changes.pop("training", {}),
        "data": data | changes.pop("data", {}),
    }
    return content | changes


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def train(content: dict[str, Any], *flags: object) -> Result:
    return command("train", write_config(Path("config.yaml"), content), *flags)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Press Ctrl-C at the end of a step, once."""
    usual = ShowProgress.on_step_end
    pressed: list[int] = []

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        usual(self, args, state, control, **more)
        if state.global_step == step and not pressed:
            pressed.append(step)
            raise KeyboardInterrupt

    monkeypatch.setattr(ShowProgress, "on_step_end", on_step_end)


@pytest.mark.parametrize(
    ("task", "method", "training", "step"),
    [
        # In the second of three epochs of 5 steps.
        pytest.param("classification", "msplora", {}, 7, marks=pytest.mark.slow),
        ("sft", "msplora", {"eval_steps": 2, "gradient_accumulation": 2}, 5),
        pytest.param("sft", "full", {}, 12, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    bases: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    method: str,
    training: dict[str, Any],
    step: int,
) -> None:
    content = config(bases, task, method=method, training=training)
    assert train(content, "--output", "straight").code == 0
    stop_at(monkeypatch, step)
    stopped = train(content)
    assert stopped.code == 130
    assert "--resume" in stopped.error
    assert str(here / "run.unfinished") in stopped.error
    assert not Path("run").exists()
    assert list(Path("run.unfinished/checkpoints").glob("checkpoint-*"))
    resumed = train(content, "--resume")
    assert resumed.code == 0, resumed.err
    assert not list(here.glob("*unfinished"))
    weights = "model" if method == "full" else "adapter"
    assert same(tensors(Path("straight") / weights), tensors(Path("run") / weights))
    for name in ("metrics.json", "plan.json"):
        assert Path("straight", name).read_bytes() == Path("run", name).read_bytes()
    histories = [
        [
            (list(entry), entry["step"], entry["loss"], entry["learning_rate"])
            for entry in read_json(Path(run) / "log_history.json")
            if "loss" in entry
        ]
        for run in ("straight", "run")
    ]
    assert histories[0] == histories[1]
    assert len(histories[0]) >= step


def test_two_runs_are_the_same_and_another_seed_is_another(bases: Path, here: Path) -> None:
    content = config(bases, training={"epochs": 1})
    for output, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train(content, "--output", output, "--seed", seed).code == 0
    first, second, third = (tensors(Path(name) / "adapter") for name in "abc")
    assert same(first, second)
    assert not same(first, third)
    assert "seed: 2" in Path("c/config.yaml").read_text()


def test_an_interruption_before_the_first_checkpoint_starts_anew_on_resume(
    bases: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = config(bases, training={"epochs": 1})
    assert train(content, "--output", "straight").code == 0
    stop_at(monkeypatch, 2)
    assert "--resume" in train(content).error
    assert train(content, "--resume").code == 0
    assert same(tensors(Path("straight/adapter")), tensors(Path("run/adapter")))


def test_a_full_disk_says_how_to_go_on(
    bases: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import msplora.train.results as running

    content = config(bases, training={"epochs": 1})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(running, "model_card", full)
        stopped = train(content)
    assert stopped.code == 1
    assert "No space left" in stopped.error
    assert "--resume" in stopped.error
    assert not Path("run").exists()
    assert train(content, "--resume").code == 0


def test_ctrl_c_outside_the_training_loop_says_how_to_go_on_too(
    bases: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import msplora.train.results as running

    content = config(bases, training={"epochs": 1})

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "model_card", interrupted)
        stopped = train(content)
    assert stopped.code == 130
    assert "--resume" in stopped.error
    assert not Path("run").exists()
    assert train(content, "--resume").code == 0
    metrics = read_json(Path("run/metrics.json"))
    assert metrics["before"] is not None  # measured by the run that was stopped


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(
    bases: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = config(bases)
    stop_at(monkeypatch, 11)
    train(content)
    checkpoints = Path("run.unfinished/checkpoints")
    newest = max(checkpoints.glob("checkpoint-*"), key=lambda its: int(its.name.partition("-")[2]))
    for name in ("trainer_state.json", "adapter_model.safetensors"):
        (newest / name).unlink()
    assert train(content, "--resume").code == 0
    assert train(content, "--output", "straight").code == 0
    assert same(tensors(Path("straight/adapter")), tensors(Path("run/adapter")))


def test_resuming_under_other_settings_is_refused(
    bases: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = config(bases)
    stop_at(monkeypatch, 6)
    train(content)
    before = tree(here)
    for flag, said in (
        ("training.learning_rate=0.5", "training.learning_rate was 0.01 and is 0.5"),
        ("adapter.r=4", "adapter.r was None and is 4"),
        ("data.columns.prompt=text", "data.columns was {}"),
    ):
        result = train(content, "--resume", "--set", flag)
        assert result.code == 1
        assert said in result.error
    without = train(content)
    assert without.code == 1
    assert "--resume to continue it, or --force" in without.error
    both = train(content, "--resume", "--force")
    assert both.code == 1
    assert tree(here) == before
    assert train(content, "--resume", "--set", "training.save_limit=5").code == 0
    again = train(content, "--resume")
    assert again.code == 1
    assert "is complete; there is nothing to resume" in again.error
    nothing = train(content, "--resume", "--output", "other")
    assert "no unfinished run" in nothing.error


def test_an_output_that_holds_something_is_not_touched(
    bases: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = config(bases, training={"epochs": 1})
    Path("run").mkdir()  # empty is free
    assert train(content).code == 0
    before = tree(here / "run")
    refused = train(content)
    assert refused.code == 1
    assert "is not empty" in refused.error
    assert "--force" in refused.error
    # Forced, it is replaced, but only by a run that is complete.
    broken = train(content, "--force", "--set", "data.max_length=65")
    assert broken.code == 1
    assert tree(here / "run") == before
    stop_at(monkeypatch, 3)
    broken = train(content, "--force")
    assert broken.code == 130
    assert tree(here / "run") == before
    assert train(content, "--force", "--seed", 7).code == 0
    assert tree(here / "run") != before
    assert sorted(its.name for its in here.iterdir()) == ["config.yaml", "run"]


def test_force_deletes_runs_only(bases: Path, here: Path) -> None:
    content = config(bases, training={"epochs": 1})
    for folder in ("run", "run.unfinished"):
        Path(folder).mkdir()
        for name in ("thesis.txt", "config.yaml"):
            Path(folder, name).write_text("mine")
            if folder == "run.unfinished":
                break  # a config alone is what a killed run leaves there
            result = train(content, "--force")
            assert result.code == 1
            assert "not a run" in result.error
            assert Path(folder, name).read_text() == "mine"
        result = train(content, "--force")
        assert result.code == 1
        assert Path(folder, "thesis.txt").read_text() == "mine"
        shutil.rmtree(folder)
    # What users put among a run's files, or change in them, is theirs.
    assert train(content).code == 0
    assert {its.name for its in Path("run").iterdir()} <= _WRITTEN
    for folder, name, said in (
        ("run", "thesis.txt", "thesis.txt"),
        ("run", "adapter/thesis.txt", "adapter/thesis.txt"),
        ("run", "README.md", "README.md (changed since)"),
        ("run.unfinished", "thesis.txt", "thesis.txt"),
    ):
        Path(folder).mkdir(exist_ok=True)
        if folder == "run.unfinished":
            shutil.copy("run/config.yaml", folder)
        file = Path(folder, name)
        before = file.read_text() if file.exists() else None
        file.write_text("mine")
        result = train(content, "--force")
        assert result.code == 1
        assert f"{Path(folder).resolve()} holds what its run did not write: {said}." in result.error
        assert file.read_text() == "mine"
        file.unlink() if before is None else file.write_text(before)
    shutil.rmtree("run.unfinished")
    shutil.rmtree("run")
    # A neighbour whose name looks like one of ours is nobody's business.
    Path("run.replaced").mkdir()
    Path("run.replaced/thesis.txt").write_text("mine")
    assert train(content).code == 0
    assert train(content, "--force").code == 0
    assert Path("run.replaced/thesis.txt").read_text() == "mine"


def test_what_came_into_the_output_while_a_run_trained_is_kept(
    bases: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = RunFolder.finish

    def finish(folder: RunFolder) -> Path:
        if folder.checkpoints.exists():
            folder.path.mkdir()
            (folder.path / "thesis.txt").write_text("mine")
        return usual(folder)

    monkeypatch.setattr(RunFolder, "finish", finish)
    content = config(bases, training={"epochs": 1})
    said = train(content).error
    assert "holds thesis.txt, which no run wrote" in said
    assert "thesis.txt" in train(content, "--resume").error
    assert Path("run/thesis.txt").read_text() == "mine"
    Path("run").rename("thesis")
    assert "--resume" in said
    resumed = train(content, "--resume")  # the training is done: it only takes its name
    assert "complete but for its name" in resumed.out
    assert Path("run/metrics.json").is_file()


def test_a_complete_run_of_other_data_is_not_called_complete(bases: Path, here: Path) -> None:
    shutil.copy(bases / "answered.jsonl", here)
    content = config(bases, training={"epochs": 1}, data={"train": "answered.jsonl"})
    for _ in range(2):
        assert train(content, "--resume", "auto").code == 0
    write_jsonl(here / "answered.jsonl", answered_rows(39))
    again = train(content, "--resume", "auto")
    assert again.code == 1
    assert f"began with other files: {here / 'answered.jsonl'} changed since" in again.error
    assert train(content, "--force").code == 0


def test_an_output_that_cannot_be_a_folder(bases: Path, here: Path) -> None:
    Path("file").write_text("mine")
    for output in ("file", "file/run", "/"):
        settings = make_settings(config(bases, output=output), "a test")
        with pytest.raises(RunFolderError):
            RunFolder(settings)
    assert Path("file").read_text() == "mine"


def test_an_output_that_cannot_be_renamed_is_refused_before_training(
    bases: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's volume, or the folder the user is in: the very last step would fail."""
    (here / "volume").mkdir()
    settings = make_settings(config(bases, output=str(here / "volume")), "here")
    RunFolder(settings)
    with monkeypatch.context() as inside:
        inside.chdir(here / "volume")
        with pytest.raises(RunFolderError, match=r"the folder you are in.*volume/run"):
            RunFolder(settings)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == here / "volume")
    with pytest.raises(RunFolderError, match="another file system is mounted"):
        RunFolder(settings, resume="auto")


@pytest.mark.parametrize("task", ["classification", "sft"])
@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_no_weights(
    bases: Path, here: Path, task: str, logging_steps: int
) -> None:
    """Noticed by the loss where it is logged in time, else by the evaluation."""
    training = {"learning_rate": 1e30, "logging_steps": logging_steps}
    content = config(bases, task, training=training)
    if task == "sft":  # a model with LayerNorm; RMSNorm turns infinities into zeros
        folder = save_decoder(here / "gpt2")
        hf.GPT2LMHeadModel(
            hf.GPT2Config(n_layer=4, n_embd=16, n_head=2, vocab_size=64, n_positions=64)
        ).save_pretrained(folder)
        content["model"] = str(folder)
    result = train(content)
    assert result.code == 3
    assert "Lower training.learning_rate" in result.error
    assert ("training loss" in result.error) == (logging_steps == 1)
    assert not Path("run").exists()


def test_weights_that_the_very_last_step_spoilt_are_not_kept(
    bases: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loss is computed after the last step where nothing is held out."""
    import torch

    usual = ShowProgress.on_step_end

    def on_step_end(
        self: Any, args: Any, state: Any, control: Any, model: Any = None, **more: Any
    ) -> None:
        usual(self, args, state, control, **more)
        if state.global_step == state.max_steps:
            with torch.no_grad():
                next(its for its in model.parameters() if its.requires_grad).fill_(torch.nan)

    monkeypatch.setattr(ShowProgress, "on_step_end", on_step_end)
    content = config(bases, data={"validation_fraction": 0}, training={"logging_steps": 50})
    result = train(content)
    assert result.code == 3
    assert "hold no numbers" in result.error
    assert not Path("run").exists()


# Everything else that is refused: nothing is made, nothing changed, the reason said.

REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("sft", {"training": {"learning_rte": 1}}, "Did you mean 'training.learning_rate'?"),
    ("sft", {"model": "nowhere/at/all"}, "there is no such folder"),
    ("sft", {"model": "./decodr"}, "there is no such folder"),
    ("sft", {"model": "nobody/nothing"}, "neither a folder here nor to be had from the hub"),
    ("sft", {"tokenizer": "./nowhere"}, "there is no such folder"),
    ("sft", {"data": {"train": "missing.jsonl"}}, "does not exist"),
    ("sft", {"data": {"columns": {"prompt": "question"}}}, "no column 'question'"),
    ("classification", {"data": {"text_columns": ["sentence"]}}, "no column 'sentence'"),
    ("classification", {"data": {"label_column": "gold"}}, "no column 'gold'"),
    ("classification", {"data": {"labels": ["good", "fair"]}}, "none of the classes"),
    ("classification", {"data": {"train": "empty.jsonl"}}, "is empty"),
    ("sft", {"data": {"train": "empty.jsonl"}}, "is empty"),
    ("sft", {"data": {"train": "empty.txt"}}, "is empty"),
    ("classification", {"data": {"train": "long.jsonl"}}, "the model has 16 positions"),
    ("classification", {"data": {"max_length": 17}}, "Set data.max_length to 16 or less"),
    ("sft", {"data": {"train": "long-answers.jsonl"}}, "the model has 64 positions"),
    ("sft", {"data": {"max_length": 65}}, "Set data.max_length to 64 or less"),
    ("sft", {"data": {"max_length": 3, "too_long": "error"}}, "too_long is 'error'"),
    ("sft", {"adapter": {"target_modules": ["q_prj"]}}, "Did you mean"),
    ("sft", {"method": "lora", "adapter": {"target_modules": ["q_prj"]}}, "mean 'q_proj'"),
    ("sft", {"adapter": {"r": 2}}, "ranks"),
    (
        "sft",
        {"adapter": {"target_modules": "all-linear", "layers_to_transform": [0]}},
        "layers_to_transform",
    ),
    ("sft", {"method": "lora", "adapter": {"layers_pattern": "layers"}}, "layers_to_transform"),
    ("sft", {"training": {"metric_for_best": "accuracy"}}, "Did you mean 'token_accuracy'?"),
    ("classification", {"training": {"metric_for_best": "f1"}}, "this task has loss, accuracy"),
    ("sft", {"data": {"chat_template": "none.jinja"}}, "none.jinja does not exist"),
    ("sft", {"dtype": "float16"}, "needs a GPU"),
    ("sft", {"init_from": "nowhere"}, "there is no folder"),
]


@pytest.mark.parametrize(("task", "changes", "said"), REFUSALS)
def test_a_refused_run_leaves_everything_as_it_was(
    bases: Path, here: Path, task: str, changes: dict[str, Any], said: str
) -> None:
    import torch

    if "float16" in changes.values() and torch.cuda.is_available():
        pytest.skip("with a GPU, float16 is allowed")
    for name in ("empty.jsonl", "empty.txt"):
        Path(name).write_text("")
    row = {"text": " ".join(["w1"] * 20), "label": "good"}
    write_jsonl(Path("long.jsonl"), [*labelled_rows(20), row])
    row = {"prompt": "w1", "completion": " w2" * 70}
    write_jsonl(Path("long-answers.jsonl"), [*answered_rows(20), row])
    file = write_config(Path("config.yaml"), config(bases, task, **changes))
    before = tree(here), tree(bases)
    result = command("train", file)
    assert result.code == 1
    assert result.error.startswith("Error:")
    assert said in result.error
    assert (tree(here), tree(bases)) == before
    assert not list(here.glob("run*"))
