"""Output folders: nothing of the user's is deleted, and what cannot be written is refused early."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from msplora.folder_mark import CONVERSION as MARK
from msplora.folder_mark import not_written
from msplora.folders import (
    OutputError,
    cannot_be_renamed,
    check_output,
    new_folder,
    put_in_place,
)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A conversion, with a file in a sub-folder."""
    return write(tmp_path / "out")


def write(out: Path, content: str = "numbers", force: bool = False) -> Path:
    with new_folder(out, force, made_from="adapter") as folder:
        (folder / "model.safetensors").write_text(content)
        (folder / "config.json").write_text("{}")
        (folder / "templates").mkdir()
        (folder / "templates" / "tool.jinja").touch()
    return out


def everything(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def test_force_replaces_what_was_written(earlier: Path, tmp_path: Path) -> None:
    (earlier / "config.json").unlink()  # that something is gone is no loss
    write(earlier, "newer", force=True)
    assert (earlier / "model.safetensors").read_text() == "newer"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("model.safetensors", "trained", r"model\.safetensors \(changed since\)"),  # its old size
        ("results.csv", "mine", r"results\.csv"),
        (".git", "gitdir: elsewhere", r"\.git"),
        ("templates/mine.jinja", "mine", r"templates/mine\.jinja"),
        ("runs/1/loss.csv", "mine", "not write: runs\\."),
        (MARK, "{}", "no earlier conversion"),
        (MARK, '{"from": "adapter", "msplora": "0.1"}', "no earlier conversion"),
    ],
)
def test_force_deletes_nothing_else(earlier: Path, path: str, content: str, said: str) -> None:
    (earlier / path).parent.mkdir(parents=True, exist_ok=True)
    (earlier / path).write_text(content)
    before = everything(earlier)
    with pytest.raises(OutputError, match=said):
        write(earlier, "newer", force=True)
    assert everything(earlier) == before


def test_what_changed_while_it_was_written_is_kept(earlier: Path) -> None:
    def slowly() -> None:
        with new_folder(earlier, force=True, made_from="adapter") as folder:
            (folder / "model.safetensors").write_text("newer")
            (earlier / "model.safetensors").write_text("trained")

    with pytest.raises(OutputError, match="changed since"):
        slowly()
    assert (earlier / "model.safetensors").read_text() == "trained"


def test_a_copy_of_a_conversion_is_one(earlier: Path, tmp_path: Path) -> None:
    earlier.rename(tmp_path / "copy")
    os.utime(tmp_path / "copy" / "model.safetensors", (0, 0))
    assert not_written(tmp_path / "copy", MARK) == []


def test_an_empty_folder_stays_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be mounted, or be where the user is; its owner and rights are as they were made."""
    out = tmp_path / "out"
    out.mkdir(mode=0o710)
    before = out.stat()
    monkeypatch.chdir(out)
    write(Path("."))
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)
    assert sorted(os.listdir(".")) == ["config.json", MARK, "model.safetensors", "templates"]
    with pytest.raises(OutputError, match="is the folder you are in"):
        write(Path("."), force=True)
    monkeypatch.chdir(tmp_path)
    write(out, "newer", force=True)
    assert (out / "model.safetensors").read_text() == "newer"
    assert os.listdir(tmp_path) == ["out"]


def test_what_fails_leaves_an_empty_folder_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "model.safetensors" and target.parent == out:
            raise OSError(errno.EIO, "no such luck")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match=r"no such luck.*; choose another place"):
        write(out)
    assert os.listdir(out) == []
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_kill_left_in_an_empty_folder_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "out" / ".out.partial-killed").mkdir(parents=True)
    check_output(tmp_path / "out", force=False)
    write(tmp_path / "out")
    assert ".out.partial-killed" not in os.listdir(tmp_path / "out")


def test_two_that_fill_one_folder_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    def late() -> None:
        with new_folder(tmp_path / "out", force=True) as folder:
            (folder / "late").touch()
            write(tmp_path / "out")

    with pytest.raises(OutputError, match="not empty"):
        late()
    assert not (tmp_path / "out" / "late").exists()
    assert (tmp_path / "out" / MARK).exists()


def test_a_mounted_folder_is_filled_and_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    rename = Path.rename

    def busy(self: Path, target: Path) -> Path:
        if out in (self, target):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    write(out)
    before = everything(out)
    with pytest.raises(OutputError, match="another file system is mounted"):
        check_output(out, force=True)
    assert everything(out) == before


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "empty").symlink_to(tmp_path / "disk")
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    write(tmp_path / "empty")
    write(tmp_path / "dangling")
    write(tmp_path / "dangling", "newer", force=True)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "disk", "empty", "new"]
    assert (tmp_path / "empty").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    assert (tmp_path / "disk" / MARK).is_file()
    assert (tmp_path / "new" / "model.safetensors").read_text() == "newer"


def places_that_cannot_be(folder: Path) -> Iterator[tuple[Path, str]]:
    (folder / "file").touch()
    (folder / "round").symlink_to(folder / "round")
    yield folder / "file", "is a file"
    yield folder / "file" / "out", "file' is a file"
    yield folder / "file" / "below" / "out", "file' is a file"
    yield folder / ("x" * 245), "name too long"
    yield folder / ("x" * 300), "name too long"
    yield folder / ("x" * 300) / "out", "name too long"
    yield folder / "round" / "out", "cannot be found"


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    for out, said in places_that_cannot_be(tmp_path):
        with pytest.raises(OutputError, match=f"(?i){said}"):
            check_output(out, force=True)
    check_output(tmp_path / "new" / "out", force=False)
    assert sorted(os.listdir(tmp_path)) == ["file", "round"]


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(Path("~/out"))
    assert (tmp_path / "out" / MARK).is_file()


def test_a_result_that_can_be_put_nowhere_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even back: the next one to come puts it back."""
    for name in ("new", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    rename, out = Path.rename, tmp_path / "out"

    def failing(self: Path, target: Path) -> Path:
        if target == out:
            raise OSError(errno.EIO, "no such luck")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="no such luck"):
            put_in_place(tmp_path / "new", out)
    assert not out.exists()
    with pytest.raises(OutputError, match="not empty"), new_folder(out):
        pass
    assert os.listdir(out) == ["out"]
    assert sorted(os.listdir(tmp_path)) == ["new", "out"]


def test_a_bind_within_one_file_system_is_a_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the table of mounts tells."""
    monkeypatch.setattr(os.path, "ismount", lambda _: False)
    if not Path("/proc/self/mountinfo").exists():
        pytest.skip("only Linux has a table of mounts")
    assert cannot_be_renamed(Path("/proc")) == "is where another file system is mounted"
    assert cannot_be_renamed(Path("/proc/self")) is None


def test_another_user_s_left_over_is_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a shared folder a killed conversion leaves one that only its owner can open."""
    theirs = tmp_path / ".out.partial-theirs"
    theirs.mkdir()
    original = os.open

    def refused(path: object, *options: int, **more: int | None) -> int:
        if path == theirs:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *options, **more)  # pyright: ignore

    monkeypatch.setattr("msplora.folders.os.open", refused)
    write(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [theirs.name, "out"]


def test_the_weights_can_be_read_by_whom_the_folder_can(tmp_path: Path) -> None:
    """safetensors makes its files private, and a server may be another user."""
    with new_folder(tmp_path / "out") as folder:
        (folder / "model.safetensors").touch(0o600)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o644
