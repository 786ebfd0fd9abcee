"""Writing a folder so that nothing is lost: beside the target, checked, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import MSPLoraError


class OutputError(MSPLoraError):
    """The output cannot be written where it was asked for."""


def check_output(out: Path, force: bool) -> None:
    """Refuse an output that would overwrite something, before any work is done.

    Raises:
        OutputError: `out` is a file, or a folder that is not empty and `force` is not set.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {str(out)!r} is a file; give a folder.")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise OutputError(
            f"the output folder {str(out)!r} is not empty. Choose another, or pass --force to "
            f"replace it."
        )
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise OutputError(f"the folder {str(parent)!r} is not writable.")


@contextmanager
def new_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `out` that takes its place when the block succeeds.

    Until then `out` stays as it was; after an error nothing of the new folder is left.
    """
    check_output(out, force)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        try:
            yield partial
        except OSError as error:
            raise OutputError(
                f"writing {str(out)!r} failed: {error}. Nothing was changed; free some space or "
                f"choose another place."
            ) from error
        partial.chmod(0o755)  # mkdtemp's folders are private
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
            out.rename(old / out.name)
            partial.rename(out)
            shutil.rmtree(old)
        else:
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
