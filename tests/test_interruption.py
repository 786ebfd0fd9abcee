"""A run that is stopped, killed or out of space at any moment goes on to the same bits."""

from __future__ import annotations

import errno
import json
import os
import resource
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from killed_runs import config, run_to_its_end, save_bases, what_was_found
from msplora.train.checkpoints import SEAL, read
from msplora.train.progress import ShowProgress
from msplora.train.run_folder import RunFolder
from msplora.train.settings_file import make_settings
from runs import Result, tree, write_config
from runs import msplora as command


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def straight(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What a run that nobody interrupts finds."""
    known: dict[str, Any] = {}

    def found(task: str, **training: Any) -> Any:
        key = f"{task} {training}"
        if key not in known:
            here = tmp_path_factory.mktemp("straight")
            assert train(here, config(bases, task, here / "run", **training)).code == 0
            known[key] = what_was_found(here / "run")
        return known[key]

    return found


def train(here: Path, content: dict[str, Any], *flags: object) -> Result:
    return command("train", write_config(here / "config.yaml", content), *flags)


@contextmanager
def at_step(step: int, *happens: Callable[[], Any]) -> Iterator[None]:
    """Within the block, let something happen at the end of a step."""
    usual = ShowProgress.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        usual(self, args, state, control, **more)
        if state.global_step == step:
            for one in happens:
                one()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShowProgress, "on_step_end", on_step_end)
        yield


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


# Stopping on purpose


@pytest.mark.parametrize(
    ("task", "number", "step"),
    [
        ("classification", signal.SIGTERM, 7),  # in the middle of an epoch, and of a log entry
        ("sft", signal.SIGINT, 2),
        ("sft", signal.SIGTERM, 5),  # where the epoch's evaluation is still to come
    ],
)
def test_a_stop_saves_this_step_and_says_how_to_go_on(
    bases: Path,
    straight: Callable[..., Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    task: str,
    number: int,
    step: int,
) -> None:
    content = config(bases, task, tmp_path / "run")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with at_step(step, send(number)):
        stopped = train(tmp_path, content)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert stopped.code == 128 + number
    assert "stopping after this step. Ctrl-C" in capfd.readouterr().err
    checkpoint = tmp_path / f"run.unfinished/checkpoints/checkpoint-{step}"
    assert f"{checkpoint}, of step {step}" in stopped.error
    assert read(checkpoint).step == step
    said = shlex.split(stopped.error.partition("To go on: ")[2])
    assert said[0] == "msplora"
    resumed = command(*said[1:])
    assert resumed.code == 0, resumed.err
    assert f"goes on after step {step}" in " ".join(resumed.out.split())
    assert what_was_found(tmp_path / "run") == straight(task)


def test_a_second_ctrl_c_stops_at_once(bases: Path, tmp_path: Path) -> None:
    content = config(bases, "sft", tmp_path / "run")
    with at_step(7, send(signal.SIGINT), send(signal.SIGINT)):
        stopped = train(tmp_path, content)
    assert stopped.code == 130
    assert "Stopped at once" in stopped.error
    assert "of step 5" in stopped.error


def test_a_stop_during_an_evaluation_waits_for_it(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of one before training, after which no step is made."""
    from msplora.train.held_out_trainer import JudgesHeldOutRows

    usual = JudgesHeldOutRows.evaluate

    def evaluate(*arguments: Any) -> Any:
        send(signal.SIGINT)()
        return usual(*arguments)

    monkeypatch.setattr(JudgesHeldOutRows, "evaluate", evaluate)
    with at_step(1, pytest.fail):
        stopped = train(tmp_path, config(bases, "sft", tmp_path / "run"))
    assert stopped.code == 130
    assert "No checkpoint had been saved yet" in stopped.error
    assert "stopping after this evaluation. Ctrl-C again" in capfd.readouterr().err


def test_a_stop_at_the_last_step_lets_the_run_finish(
    bases: Path,
    straight: Callable[..., Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    content = config(bases, "sft", tmp_path / "run")
    with at_step(10, send(signal.SIGTERM)):
        assert train(tmp_path, content).code == 0
    assert "so the run is being finished. Ctrl-C stops at once" in capfd.readouterr().err
    assert what_was_found(tmp_path / "run") == straight("sft")


# What is left to do


def test_resume_auto_starts_continues_and_leaves_alone(
    bases: Path, straight: Callable[..., Any], tmp_path: Path
) -> None:
    content = config(bases, "sft", tmp_path / "run", save_steps=2)
    nothing = train(tmp_path, content, "--resume")
    assert nothing.code == 1
    assert "--resume auto" in nothing.error
    with at_step(8, send(signal.SIGTERM)):
        assert train(tmp_path, content, "--resume", "auto").code == 143
    # The newest two, and the best one at the time of each.
    kept = {its.name for its in (tmp_path / "run.unfinished/checkpoints").glob("checkpoint-*")}
    assert kept == {"checkpoint-5", "checkpoint-6", "checkpoint-8"}
    other = train(tmp_path, content, "--resume=auto", "--seed", 7)
    assert other.code == 1
    assert "seed was 42 and is 7" in other.error
    # How often it is saved changes no number, so it may be changed.
    assert train(tmp_path, content, "--resume=auto", "--set", "training.save_steps=3").code == 0
    assert what_was_found(tmp_path / "run") == straight("sft")
    before = tree(tmp_path)
    again = train(tmp_path, content, "--resume", "auto", "--set", "training.save_steps=3")
    assert again.code == 0
    assert "there is nothing to do" in " ".join(again.out.split())
    other = train(tmp_path, content, "--resume", "auto", "--seed", 7)
    assert other.code == 1
    assert "complete run" in other.error
    assert "seed was 42 and is 7. Name another output for these, with init_from: " in other.error
    lora = train(tmp_path, content, "--resume", "auto", "--method", "lora")
    assert "Name another output for these. --force" in lora.error  # which starts from no pyramid
    (tmp_path / "config.yaml").unlink()
    assert tree(tmp_path) == {name: its for name, its in before.items() if name != "config.yaml"}


@pytest.mark.parametrize("words", [["--resume=runs/x"], ["--resume", "runs/x"]])
def test_resume_takes_nothing_or_auto(bases: Path, tmp_path: Path, words: list[str]) -> None:
    refused = train(tmp_path, config(bases, "sft", tmp_path / "run"), *words)
    assert refused.code == 2
    assert "stands alone or takes auto, not 'runs/x'" in refused.error
    assert "init_from" in refused.error


def test_a_word_too_many_is_named_whether_resume_is_there_or_not() -> None:
    for words in (["a.yaml", "b.yaml"], ["a.yaml", "--resume", "auto", "b.yaml"]):
        refused = command("train", *words)
        assert refused.code == 2
        assert "unexpected extra argument(s) (b.yaml)" in refused.error
    # Before the config it stands alone.
    assert "the config file a.yaml does not exist" in command("train", "--resume", "a.yaml").error


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "sft"])
def test_after_the_last_step_no_other_is_trained(
    bases: Path,
    straight: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
) -> None:
    """A run of 7 steps ends within an epoch, which transformers would go on with."""
    import msplora.train.results as running

    content = config(bases, task, tmp_path / "run", max_steps=7)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "model_card", stopped)
        assert train(tmp_path, content).code == 130
    # Moved too: its best checkpoint is no longer where it was.
    (tmp_path / "run.unfinished").rename(tmp_path / "moved.unfinished")
    with at_step(8, pytest.fail):
        assert train(tmp_path, content, "--resume", "--output", tmp_path / "moved").code == 0
    assert what_was_found(tmp_path / "moved") == straight(task, max_steps=7)


def test_an_unfinished_run_may_be_moved_and_one_that_is_damaged_goes_further_back(
    bases: Path, straight: Callable[..., Any], tmp_path: Path
) -> None:
    content = config(bases, "classification", tmp_path / "run", save_steps=1)
    expected = straight("classification")
    # It has to go back to one before the move.
    assert json.loads(expected["metrics"])["best"]["step"] == 5
    with at_step(8, send(signal.SIGTERM)):
        train(tmp_path, content)
    moved = tmp_path / "elsewhere/run.unfinished"
    moved.parent.mkdir()
    (tmp_path / "run.unfinished").rename(moved)
    optimizer = moved / "checkpoints/checkpoint-8/optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    resumed = train(tmp_path, content, "--resume", "--output", moved.with_name("run"))
    assert resumed.code == 0, resumed.err
    said = " ".join(resumed.out.split())
    assert "skipped checkpoint-8: optimizer.pt has" in said
    assert "goes on after step 7" in said
    assert what_was_found(tmp_path / "elsewhere/run") == expected
    assert str(tmp_path / "elsewhere/run") in (tmp_path / "elsewhere/run/config.yaml").read_text()


def test_where_no_checkpoint_is_whole_it_starts_again(
    bases: Path, straight: Callable[..., Any], tmp_path: Path
) -> None:
    content = config(bases, "sft", tmp_path / "run")
    with at_step(7, send(signal.SIGTERM)):
        train(tmp_path, content)
    # The one of step 7 goes back to that of step 5, which is lost.
    shutil.rmtree(tmp_path / "run.unfinished/checkpoints/checkpoint-5")
    resumed = train(tmp_path, content, "--resume", "auto")
    said = " ".join(resumed.out.split())
    assert "skipped checkpoint-7: the best one until then, checkpoint-5, cannot be used" in said
    assert "starts again from the beginning" in said
    assert what_was_found(tmp_path / "run") == straight("sft")


def test_other_data_than_it_began_with_is_refused(bases: Path, tmp_path: Path) -> None:
    content = config(bases, "sft", tmp_path / "run")
    data = tmp_path / "mine.jsonl"
    shutil.copy(content["data"]["train"], data)
    content["data"]["train"] = str(data)
    with at_step(3, send(signal.SIGTERM)):
        train(tmp_path, content)
    kept = data.read_bytes()
    data.write_bytes(kept.replace(b"w1", b"w2"))
    before = tree(tmp_path)
    refused = train(tmp_path, content, "--resume", "auto")
    assert refused.code == 1
    assert f"began with other files: {data} changed since" in refused.error
    assert tree(tmp_path) == before
    data.write_bytes(kept)
    assert train(tmp_path, content, "--resume", "auto").code == 0


def test_another_number_of_processes_is_refused(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever starts them: the settings', or a launcher that these know nothing of."""
    content = config(bases, "sft", tmp_path / "run")
    with at_step(3, send(signal.SIGTERM)):
        train(tmp_path, content)
    file = tmp_path / "run.unfinished/checkpoints/checkpoint-3" / SEAL
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processes": 4}))
    before = tree(tmp_path)
    refused = train(tmp_path, content, "--resume", "auto")
    assert refused.code == 1
    assert "was written by 4 processes, and this run has 1" in refused.error
    assert "--processes 4" in refused.error
    assert "--force" not in refused.error
    assert tree(tmp_path) == before
    monkeypatch.setenv("WORLD_SIZE", "4")
    own = RunFolder(make_settings(content, "a test"), resume=True)
    assert own.go_on.startswith("with the launcher it was started with, 4 processes: msplora train")
    started = RunFolder(
        make_settings(content | {"devices": {"processes": 4}}, "a test"), resume=True
    )
    assert started.go_on.startswith("msplora train")


# A full disk


class _LimitFiles:
    """From some step on no file may be larger, which fails as a full disk does."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def __call__(self) -> None:
        usual, size = ShowProgress.on_step_end, self.size

        def on_step_end(its: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
            usual(its, args, state, control, **more)
            if state.global_step == self.step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        ShowProgress.on_step_end = on_step_end


@pytest.mark.slow
@pytest.mark.parametrize("size", [10_000, 40_000])  # the adapter fails, or the optimizer
def test_a_full_disk_leaves_the_last_checkpoint_whole(
    bases: Path, straight: Callable[..., Any], tmp_path: Path, size: int
) -> None:
    content = config(bases, "sft", tmp_path / "run", save_steps=1)
    assert run_to_its_end(content, _LimitFiles(8, size)) == 1
    said = (tmp_path / "run.log").read_text().splitlines()[-1]
    assert "could not be written" in said
    assert "checkpoint-7, of step 7. Once it can be, to go on: " in said  # a limit, not a full disk
    saved = tmp_path / "run.unfinished/checkpoints"
    assert not list(saved.glob(".*"))
    assert not (saved / "checkpoint-8").exists()
    assert train(tmp_path, content, "--resume").code == 0
    assert what_was_found(tmp_path / "run") == straight("sft")


class _Away(OSError):
    """As `requests` has it where a tracker's server is away: an OSError without a number."""


@pytest.mark.parametrize(
    ("kind", "arguments", "said", "advice"),
    [
        (OSError, (errno.ENOSPC, "No space left"), "could not be written", "Free some space; then"),
        (SafetensorError, ("(os error 28)",), "could not be written", "Free some space; then"),
        (SafetensorError, ("(os error 27)",), "could not be written", "Once it can be, to go"),
        (_Away, ("no answer",), "not its own: _Away: no answer. The", "To go on"),
        (FileNotFoundError, (2, "No such file", "image.png"), "FileNotFoundError: [Err", "To go"),
    ],
)
def test_only_a_full_disk_is_called_one(
    bases: Path,
    tmp_path: Path,
    kind: type[Exception],
    arguments: tuple[Any, ...],
    said: str,
    advice: str,
) -> None:
    def fail() -> None:
        raise kind(*arguments)  # made here: one that outlives the test would keep its model

    content = config(bases, "sft", tmp_path / "run", save_steps=1)
    with at_step(3, fail):
        ended = train(tmp_path, content)
    assert ended.code == 1
    assert said in ended.error
    assert f"checkpoint-2, of step 2. {advice}" in ended.error
    assert ("Free some space" in ended.error) is (advice[0] == "F")
    assert "--resume" in ended.error


def test_a_disk_without_room_for_a_checkpoint_is_refused(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = config(bases, "sft", tmp_path / "run")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused = train(tmp_path, content)
    assert refused.code == 1
    assert "a checkpoint takes about 0.0 MB" in refused.error
    assert "Name an output on another disk" in refused.error
    assert not list(tmp_path.glob("run*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=60_000))
    assert "Lower training.save_limit" in " ".join(train(tmp_path, content).out.split())
