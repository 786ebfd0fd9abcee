"""Checkpoints and run folders are whole or not there, at whatever moment a process is killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from msplora.folder_mark import write_mark
from msplora.train.checkpoints import (
    SEAL,
    WRITING,
    Damaged,
    clear,
    find_newest,
    prune,
    put,
    read,
    seal,
)
from msplora.train.run_folder import RUN, RunFolder, RunFolderError
from msplora.train.settings_file import make_settings


def written(checkpoints: Path, step: int, best: int | None = None) -> Path:
    """A checkpoint with two files, not yet sealed."""
    folder = checkpoints / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes([step]) * 1000)
    (folder / "inner/optimizer").write_bytes(bytes([step]) * 10)
    return folder


def sealed(checkpoints: Path, step: int, best: int | None = None) -> Path:
    folder = written(checkpoints, step)
    seal(folder, step, best, 1)
    return folder


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: os.truncate(folder / "weights", 999), "has 999 bytes instead of 1,000"),
        (lambda folder: (folder / "weights").write_bytes(bytes(1000)), "checksum differs"),
        (lambda folder: (folder / "inner/optimizer").unlink(), "inner/optimizer is missing"),
        (lambda folder: (folder / SEAL).unlink(), f"no readable {SEAL}"),
        (lambda folder: os.truncate(folder / SEAL, 20), f"no readable {SEAL}"),
        (lambda folder: (folder / SEAL).write_text("[]"), f"no readable {SEAL}"),
    ],
)
def test_a_damaged_checkpoint_is_told_from_a_whole_one(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    for step in (1, 2, 10):
        sealed(tmp_path, step)
    (tmp_path / "checkpoint-draft").mkdir()
    assert read(tmp_path / "checkpoint-10").step == 10
    newest = find_newest(tmp_path).newest
    assert newest
    assert newest.step == 10
    damage(tmp_path / "checkpoint-10")
    with pytest.raises(Damaged, match=said):
        read(tmp_path / "checkpoint-10")
    found = find_newest(tmp_path)
    assert found.newest
    assert found.newest.step == 2
    assert list(found.damaged) == [tmp_path / "checkpoint-10"]


def test_one_checkpoint_is_no_use_without_the_best_one_it_goes_back_to(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3)):
        sealed(tmp_path, step, best)
    os.truncate(tmp_path / "checkpoint-3/weights", 0)
    found = find_newest(tmp_path)
    assert found.newest
    assert found.newest.step == 2
    assert {path.name for path in found.damaged} == {"checkpoint-4", "checkpoint-3"}


@pytest.mark.parametrize(("keep", "left"), [(1, {5, 2}), (2, {5, 4, 2}), (3, {5, 4, 3, 2, 1})])
def test_what_is_kept_can_always_be_gone_back_to(tmp_path: Path, keep: int, left: set[int]) -> None:
    for step, best in ((1, 1), (2, 2), (3, 1), (4, 2), (5, 2)):
        sealed(tmp_path, step, best)
    prune(tmp_path, keep)
    assert {int(path.name.partition("-")[2]) for path in tmp_path.iterdir()} == left


def test_a_damaged_seal_of_an_older_one_does_not_stop_the_next_one(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2)):
        sealed(tmp_path, step, best)
    (tmp_path / "checkpoint-1" / SEAL).write_text("")
    prune(tmp_path, 3)
    assert {path.name for path in tmp_path.iterdir()} >= {"checkpoint-2", "checkpoint-3"}
    prune(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-3"}


# Killed between any two operations on the disk


class Killed(BaseException):
    """Nothing is done any more from here on."""


@contextmanager
def killed_before(count: int) -> Iterator[list[str]]:
    """Within the block, die instead of doing the operation on the disk of this number."""
    done: list[str] = []

    def counted(name: str, usual: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **more: Any) -> Any:
            if len(done) >= count:
                raise Killed
            done.append(name)
            return usual(*arguments, **more)

        return operation

    operations = (
        *((os, name) for name in ("rename", "replace", "mkdir", "rmdir", "unlink", "fsync")),
        *((Path, name) for name in ("rename", "replace", "mkdir", "write_text", "chmod")),
    )
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in operations:
            patch.setattr(owner, name, counted(name, getattr(owner, name)))
        yield done


def killed_at_every_moment(
    here: Path, prepare: Callable[[Path], None], act: Callable[[Path], Any]
) -> Iterator[Path]:
    """A folder for every moment at which `act` may be killed, as that left it."""
    for count in range(1000):
        folder = here / str(count)
        folder.mkdir()
        prepare(folder)
        try:
            with killed_before(count):
                act(folder)
        except Killed:
            yield folder
        else:
            assert count > 5
            yield folder
            return


def test_killed_while_saving_there_is_always_a_whole_checkpoint(tmp_path: Path) -> None:
    def prepare(here: Path) -> None:
        for step, best in ((1, 1), (2, 1), (3, 3)):
            sealed(here, step, best)

    def act(here: Path) -> None:
        shutil.rmtree(here / WRITING, ignore_errors=True)
        folder = written(here / WRITING, 4)
        seal(folder, 4, 3, 1)
        put(folder, here)
        shutil.rmtree(here / WRITING)
        prune(here, 1)

    steps = []
    for here in killed_at_every_moment(tmp_path, prepare, act):
        found = find_newest(here)
        assert found.newest
        assert not found.damaged
        steps.append(found.newest.step)
        clear(here)
        assert all(path.name.startswith("checkpoint-") for path in here.iterdir())
        act(here)  # the resumed run saves the same step again, or a later one
        assert {path.name for path in here.iterdir()} == {"checkpoint-3", "checkpoint-4"}
    assert set(steps) == {3, 4}
    assert steps == sorted(steps)


def made_up(here: Path, **changes: Any) -> Any:
    content = {"model": "m", "task": "sft", "output": str(here / "run"), "data": {"train": "t"}}
    return make_settings(content | changes, "a test")


def fill(folder: RunFolder, text: str) -> None:
    """What stands in for training: a checkpoint, and then the files of the result."""
    folder.checkpoints.mkdir(exist_ok=True)
    if not (folder.checkpoints / "checkpoint-1").exists():
        sealed(folder.checkpoints, 1)
    (folder.working / "adapter").mkdir(exist_ok=True)
    (folder.working / "adapter/weights").write_text(text)
    folder.write_json("metrics.json", {"text": text})


def result_in(folder: Path) -> str | None:
    """The text of a run that is whole, or None."""
    if not (folder / "metrics.json").is_file():
        return None
    text = json.loads((folder / "metrics.json").read_text())["text"]
    assert (folder / "adapter/weights").read_text() == text
    return text


@pytest.mark.slow
@pytest.mark.parametrize("old", [None, "old"])
def test_killed_at_any_moment_a_run_folder_is_taken_up_and_no_result_is_lost(
    tmp_path: Path, old: str | None
) -> None:
    """With an old run that is replaced, and an unfinished one that is discarded, and without."""

    def prepare(here: Path) -> None:
        if old:
            folder = RunFolder(made_up(here))
            folder.begin()
            fill(folder, old)
            folder.finish()
            folder = RunFolder(made_up(here, seed=1), force=True)
            folder.begin()
            folder.release()

    def act(here: Path) -> None:
        folder = RunFolder(made_up(here), force=bool(old))
        try:
            folder.begin()
            fill(folder, "new")
            folder.finish()
        finally:
            folder.release()

    def complete(here: Path) -> None:
        """As `train_run` does with resume="auto"."""
        folder = RunFolder(made_up(here), resume="auto")
        if folder.is_complete:
            folder.clear()
        elif folder.resumes and folder.lacks_only_its_name:
            folder.finish()
        else:
            trained = result_in(folder.working) == "new"
            assert bool(folder.found.newest) or not trained  # what it took is not lost either
            folder.begin()
            fill(folder, "new")
            folder.finish()

    moments = set()
    for here in killed_at_every_moment(tmp_path, prepare, act):
        there = [result_in(path) for path in (here / "run", here / "run.unfinished")]
        aside = [result_in(path) for path in here.glob(".run.old-*/run")]
        if old:
            assert old in there + aside or there == ["new", None]
        begun = (here / "run.unfinished").exists()
        discards = begun and "seed: 1" in (here / "run.unfinished/config.yaml").read_text()
        moments.add((there[0], begun, discards))
        if discards or (old and not begun and there[0] == old):
            act(here)  # not begun yet, or the discarded one is back: --force is asked for again
        else:
            complete(here)
        assert result_in(here / "run") == "new"
        assert [path.name for path in here.iterdir()] == ["run"]
    assert ("new", False, False) in moments
    assert (old, True, False) in moments


def test_a_run_killed_before_its_checkpoints_went_can_be_discarded(tmp_path: Path) -> None:
    first = RunFolder(made_up(tmp_path))
    first.begin()
    fill(first, "first")
    write_mark(first.working, RUN, {"inputs": {}}, leave_out=["checkpoints"])
    first.release()
    again = RunFolder(made_up(tmp_path), force=True)
    again.begin()
    assert not again.lacks_only_its_name
    again.release()


def test_a_run_that_came_into_the_output_meanwhile_is_left_there(tmp_path: Path) -> None:
    def other(name: str) -> Path:
        folder = RunFolder(made_up(tmp_path / "elsewhere", seed=len(name)))
        folder.begin()
        fill(folder, name)
        return folder.finish()

    mine = RunFolder(made_up(tmp_path))
    mine.begin()
    fill(mine, "mine")
    shutil.move(other("other"), mine.path)
    with pytest.raises(RunFolderError, match=r"another run was put into .* while this one trained"):
        mine.finish()
    mine.release()
    for resume in (True, "auto"):  # no sooner than the other is away
        with pytest.raises(RunFolderError, match=r"another run was put into .*: move the other"):
            RunFolder(made_up(tmp_path), resume=resume)
    assert [result_in(path) for path in (mine.path, mine.working)] == ["other", "mine"]
    shutil.move(mine.path, tmp_path / "away")
    again = RunFolder(made_up(tmp_path), resume=True)
    assert result_in(again.finish()) == "mine"
    # What --force was given for is replaced, but not what comes after it.
    forced = RunFolder(made_up(tmp_path, seed=1), force=True)
    forced.begin()
    fill(forced, "forced")
    assert result_in(forced.finish()) == "forced"


def test_a_run_that_a_killed_process_moved_aside_is_not_replaced_unasked(tmp_path: Path) -> None:
    old = RunFolder(made_up(tmp_path))
    old.begin()
    fill(old, "old")
    aside = tmp_path / ".run.old-killed"
    aside.mkdir()
    shutil.move(old.finish(), aside / "run")
    with pytest.raises(RunFolderError, match="is not empty"):
        RunFolder(made_up(tmp_path)).begin()
    assert result_in(old.path) == "old"


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    first = RunFolder(made_up(tmp_path))
    first.begin()
    for resume, force in ((True, False), ("auto", False), (False, True)):
        with pytest.raises(RunFolderError, match="another process is at work"):
            RunFolder(made_up(tmp_path), resume, force).begin()
    first.release()
    second = RunFolder(made_up(tmp_path), resume=True)
    second.begin()
    second.release()
