"""Writing a folder so that nothing is lost: beside the target, checked, then renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from safetensors import SafetensorError

from .errors import MSPLoraError
from .folder_mark import CONVERSION, not_written, some, write_mark

# What makes a folder an adapter's or a model's comes into it last.
_LAST = ("adapter_config.json", "config.json")


class OutputError(MSPLoraError):
    """The output cannot be written where it was asked for."""


def output_folder(out: str | Path) -> Path:
    """The folder that is meant: absolute, with `~` and links followed.

    Raises:
        OutputError: its links lead round in a circle, or there is no such home.
    """
    try:
        place = Path(out).expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise OutputError(f"the output {str(out)!r} cannot be found: {error}.") from error
    if any(map(os.path.islink, (place, *place.parents))):  # Python 3.13 leaves the circle
        raise OutputError(f"the output {str(out)!r} cannot be found: its links form a circle.")
    return place


def check_output(out: Path, force: bool) -> None:
    """Refuse an output that would overwrite something or cannot be written, before any work.

    Raises:
        OutputError: `out` is a file; or a folder that is not empty and either `force` is not set,
            or it holds more than what an earlier conversion wrote, or cannot be replaced; or there
            can be no such folder.
    """
    out = output_folder(out)
    try:
        if out.exists() and not out.is_dir():
            raise OutputError(f"the output {str(out)!r} is a file; give a folder.")
        if _content(out):
            _check_replaceable(out, force)
        _check_writable(out)
    except OSError as error:
        raise OutputError(
            f"the output {str(out)!r} cannot be made: {error.strerror or error}. Choose another "
            f"place or name."
        ) from error


def _check_replaceable(out: Path, force: bool) -> None:
    if not force:
        raise OutputError(
            f"the output folder {str(out)!r} is not empty. Choose another, or pass --force to "
            f"replace it."
        )
    foreign = not_written(out, CONVERSION)
    if foreign is not None:
        foreign = [name for name in foreign if not name.startswith(_partial(out))]
    else:
        raise OutputError(
            f"the output folder {str(out)!r} is no earlier conversion: it holds "
            f"{some(_content(out))}. --force does not delete it; choose another folder."
        )
    if foreign:
        raise OutputError(
            f"the output folder {str(out)!r} holds what its conversion did not write: "
            f"{some(foreign)}. --force does not delete it; choose another folder."
        )
    if why := cannot_be_renamed(out):
        raise OutputError(
            f"the output folder {str(out)!r} {why}, so it cannot be replaced. Choose another "
            f"folder, or empty this one yourself."
        )


def cannot_be_renamed(folder: Path) -> str | None:
    """Why an existing folder cannot give its name to another, if so."""
    if os.path.ismount(folder) or _is_bound(folder):
        return "is where another file system is mounted"
    if _is_current(folder):
        return "is the folder you are in"
    return None


def _is_bound(folder: Path) -> bool:
    """Whether a folder of the same file system is mounted there, which Linux alone tells."""
    mounts = Path("/proc/self/mountinfo")
    name = str(folder.resolve()).replace(" ", r"\040")
    return mounts.exists() and any(
        line.split(" ")[4] == name for line in mounts.read_text(errors="replace").splitlines()
    )


def _is_current(folder: Path) -> bool:
    try:
        return os.path.samefile(folder, os.curdir)
    except OSError:  # the folder we are in was deleted
        return False


def _check_writable(out: Path) -> None:
    """Make, and remove, what is going to be made, as far as it goes without taking the name."""
    there = out
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise OutputError(
            f"the output {str(out)!r} cannot be made: {str(there)!r} is a file. Choose another."
        )
    tried = Path(tempfile.mkdtemp(prefix=_partial(out), dir=out.parent if _content(out) else there))
    try:
        (tried / out.relative_to(there)).mkdir(parents=True, exist_ok=True)
    finally:
        shutil.rmtree(tried, ignore_errors=True)


def check_apart(out: Path, sources: Iterable[Path]) -> None:
    """Refuse an output folder that is, or holds, what it is made from: it would be lost.

    Raises:
        OutputError: `out` is one of `sources` or a folder above one.
    """
    place = output_folder(out)
    for source in sources:
        if place in (source.resolve(), *source.resolve().parents):
            raise OutputError(
                f"the output folder {str(out)!r} would replace {str(source)!r}, which it is made "
                f"from. Choose another folder."
            )


@contextmanager
def new_folder(out: Path, force: bool = False, made_from: str | None = None) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `out` when the block succeeds.

    Until then `out` stays as it was; after an error nothing of the new folder is left. What a
    process that was killed has left is cleared away by the next one. A folder that exists and is
    empty stays the same one, with its owner and its rights, mounted or entered as it may be: the
    new one is made in it, and its files are moved up.

    Args:
        out: the folder to write.
        force: replace an earlier conversion.
        made_from: what it is a conversion of, if it is one; the folder is marked so.
    """
    out = output_folder(out)
    with _explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        clear_after_a_kill(out)
        check_output(out, force)
        fill = out.is_dir() and not _content(out)
        partial = Path(tempfile.mkdtemp(prefix=_partial(out), dir=out if fill else out.parent))
        lock = os.open(partial, os.O_RDONLY)
    with suppress(OSError):  # some network file systems have no locks
        fcntl.flock(lock, fcntl.LOCK_EX)  # held until this process ends, however it ends
    try:
        with _explained(out):
            yield partial
            if made_from is not None:
                write_mark(partial, CONVERSION, {"from": made_from})
            for file in partial.rglob("*.safetensors"):
                file.chmod(0o644)  # safetensors' files are private, as mkdtemp's folders are
            check_output(out, force and not fill)  # another process may have been quicker
            if fill:
                _move_up(partial, out)
            else:
                partial.chmod(0o755)  # mkdtemp's folders are private
                put_in_place(partial, out)
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors' own errors hide a full disk
        raise OutputError(
            f"writing {str(out)!r} failed: {error}. Nothing was changed; "
            f"{'free some space or ' if is_full(error) else ''}choose another place."
        ) from error


def is_full(error: Exception) -> bool:
    """Whether a disk or a quota is full."""
    return error_number(error) in (errno.ENOSPC, errno.EDQUOT)


def error_number(error: Exception) -> int | None:
    """The system's number of an error; that of safetensors' stands in its words only."""
    hidden = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "errno", None) or (int(hidden[1]) if hidden else None)


def put_in_place(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`; what was there is moved aside, and then removed."""
    if not out.exists():
        partial.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    try:
        out.rename(old / out.name)
        partial.rename(out)
    except BaseException:
        if not out.exists():
            (old / out.name).rename(out)
        raise
    finally:
        if out.exists():  # else the old one is there alone, until the next time clears up
            shutil.rmtree(old, ignore_errors=True)


def _move_up(partial: Path, out: Path) -> None:
    """Move what `partial` holds into the empty folder `out` above it, or nothing."""
    names = sorted(os.listdir(partial), key=lambda name: (name in _LAST, name))
    moved: list[str] = []
    try:
        for name in names:
            (partial / name).rename(out / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            (out / name).rename(partial / name)
        raise


def clear_after_a_kill(out: Path) -> None:
    """Put back a result that was moved aside, and remove folders that nobody is writing."""
    for old in out.parent.glob(f".{escape(out.name)}.old-*"):
        if (old / out.name).exists() and not out.exists():
            (old / out.name).rename(out)
        shutil.rmtree(old, ignore_errors=True)
    for folder in (out.parent, out):
        for partial in folder.glob(f"{escape(_partial(out))}*"):
            _remove_if_left(partial)


def _remove_if_left(partial: Path) -> None:
    try:
        lock = os.open(partial, os.O_RDONLY)
    except OSError:  # its process has finished, or it is another user's
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it is being written, or it cannot be known
        return
    else:
        shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def _partial(out: Path) -> str:
    """How the name of a folder begins that is to become `out`."""
    return f".{out.name}.partial-"


def _content(folder: Path) -> list[str]:
    """What a folder holds besides what is being written in it."""
    if not folder.is_dir():
        return []
    return sorted(name for name in os.listdir(folder) if not name.startswith(_partial(folder)))
