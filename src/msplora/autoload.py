"""Opt in to adapters that load anywhere: ``python -m msplora.autoload enable``.

PEFT knows the type of an MSPLoRA adapter only after `import msplora` (a sister's: after `import
msplora.sisters`); programs that load adapters by path never do that, and stop with ``KeyError:
'MSPLORA'``. This puts two small files into the environment's site-packages: one whose one line
Python runs at its start, and `autoload_hook.py`, which that line imports: it waits for an import of
PEFT, and imports msplora and its sisters then. Processes that import no PEFT notice nothing, and
without msplora PEFT is imported as ever.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
import tempfile
from pathlib import Path

from .errors import MSPLoraError

HOOK = "_msplora_autoload"
"""The name of the hook's copy; not in the package, so that it outlives one that is removed."""

USAGE = """usage: python -m msplora.autoload enable | disable | status

enable   let every Python process of this environment load MSPLoRA adapters through PEFT
disable  take that back
status   say whether it is enabled (exit code 1 if not)"""


class AutoloadError(MSPLoraError):
    """The files that Python reads at its start cannot be changed."""


def site_packages() -> Path:
    """The folder of this environment in which Python looks for what to run at its start."""
    return Path(sysconfig.get_path("purelib"))


def enable(folder: Path | None = None) -> Path:
    """Let every process of the environment register MSPLoRA with PEFT; return the line's file.

    Args:
        folder: site-packages, where not those of the Python that runs this.

    Raises:
        AutoloadError: the folder is not there, or cannot be written to.
    """
    folder = folder or site_packages()
    _check_writable(folder)
    line, hook = _files(folder)
    # The line last: it must never name a module that is not there yet.
    _write(hook, _hook_text())
    _write(line, f"import {HOOK}\n")
    return line


def disable(folder: Path | None = None) -> bool:
    """Take `enable` back; return whether there was anything to take back.

    Raises:
        AutoloadError: the folder cannot be written to.
    """
    folder = folder or site_packages()
    line, hook = _files(folder)
    compiled = Path(importlib.util.cache_from_source(str(hook)))
    found = [file for file in (line, hook, compiled) if file.exists()]
    if found:
        _check_writable(folder)
    for file in found:  # the line first
        file.unlink()
    return bool(found)


def is_enabled(folder: Path | None = None) -> bool:
    """Whether processes of this environment register MSPLoRA by themselves."""
    line, hook = _files(folder or site_packages())
    return line.is_file() and hook.is_file()


def _files(folder: Path) -> tuple[Path, Path]:
    return folder / f"{HOOK}.pth", folder / f"{HOOK}.py"


def _hook_text() -> str:
    return Path(__file__).with_name("autoload_hook.py").read_text(encoding="utf-8")


def _check_writable(folder: Path) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        found = "cannot be written to by this user" if folder.is_dir() else "is not there"
        raise AutoloadError(
            f"autoload has to change the site-packages of {sys.executable}, but {str(folder)!r} "
            f"{found}. Use a virtual environment of your own, or import msplora where the adapter "
            f"is loaded."
        )


def _write(file: Path, text: str) -> None:
    """Write a file at once: other processes start meanwhile."""
    handle, partial = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            opened.write(text)
        Path(partial).chmod(0o644)  # mkstemp's files are private
        Path(partial).replace(file)
    except OSError as error:
        Path(partial).unlink(missing_ok=True)
        raise AutoloadError(f"writing {str(file)!r} failed: {error}.") from error


def main(arguments: list[str]) -> int:
    """Do what the command line asks for, and return the exit code."""
    folder = site_packages()
    if arguments == ["enable"]:
        print(f"enabled: PEFT knows MSPLoRA adapters in every process of {sys.prefix} ({enable()})")
        return 0
    if arguments == ["disable"]:
        print(f"disabled in {folder}" if disable() else f"it was not enabled in {folder}")
        return 0
    if arguments == ["status"]:
        enabled = is_enabled()
        print(f"{'enabled' if enabled else 'not enabled'} in {folder}")
        return 0 if enabled else 1
    print(USAGE, file=sys.stdout if arguments in (["-h"], ["--help"]) else sys.stderr)
    return 0 if arguments in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MSPLoraError as error:
        sys.exit(f"Error: {error}")
