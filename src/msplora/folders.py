"""Writing a folder so that nothing is lost: beside the target, checked, then renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from safetensors import SafetensorError

from .errors import MSPLoraError

MARK = "conversion.json"
"""The file by which a conversion's folder is known: `--force` replaces no other."""


class OutputError(MSPLoraError):
    """The output cannot be written where it was asked for."""


def check_output(out: Path, force: bool) -> None:
    """Refuse an output that would overwrite something, before any work is done.

    Raises:
        OutputError: `out` is a file, or a folder that is not empty and either `force` is not set or
            it is not what an earlier conversion wrote.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {str(out)!r} is a file; give a folder.")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise OutputError(
            f"the output folder {str(out)!r} is not empty. Choose another, or pass --force to "
            f"replace it."
        )
    if out.is_dir() and any(out.iterdir()):
        others = sorted(its.name for its in out.iterdir() if its.is_dir())
        if others or not (out / MARK).is_file():
            found = others or sorted(its.name for its in out.iterdir())
            raise OutputError(
                f"the output folder {str(out)!r} is no earlier conversion: it holds "
                f"{', '.join(found[:5])}. --force does not delete it; choose another folder."
            )
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise OutputError(f"the folder {str(parent)!r} is not writable.")


def check_apart(out: Path, sources: Iterable[Path]) -> None:
    """Refuse an output folder that is, or holds, what it is made from: it would be lost.

    Raises:
        OutputError: `out` is one of `sources` or a folder above one.
    """
    for source in sources:
        if out.resolve() in (source.resolve(), *source.resolve().parents) and out.exists():
            raise OutputError(
                f"the output folder {str(out)!r} would replace {str(source)!r}, which it is made "
                f"from. Choose another folder."
            )


@contextmanager
def new_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `out` that takes its place when the block succeeds.

    Until then `out` stays as it was; after an error nothing of the new folder is left. What a
    process that was killed has left is cleared away by the next one.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    clear_after_a_kill(out)
    check_output(out, force)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # held until this process ends, however it ends
    try:
        with _explained(out):
            yield partial
            partial.chmod(0o755)  # mkdtemp's folders are private
            check_output(out, force)  # another process may have been quicker
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
            f"writing {str(out)!r} failed: {error}. Nothing was changed; free some space or choose "
            f"another place."
        ) from error


def put_in_place(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`; what was there is moved aside, and then removed."""
    if not out.exists():
        partial.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    out.rename(old / out.name)
    try:
        partial.rename(out)
    except BaseException:
        (old / out.name).rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def clear_after_a_kill(out: Path) -> None:
    """Put back a result that was moved aside, and remove folders that nobody is writing."""
    for old in out.parent.glob(f".{escape(out.name)}.old-*"):
        if (old / out.name).exists() and not out.exists():
            (old / out.name).rename(out)
        shutil.rmtree(old, ignore_errors=True)
    for partial in out.parent.glob(f".{escape(out.name)}.partial-*"):
        lock = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(partial, ignore_errors=True)
        finally:
            os.close(lock)
