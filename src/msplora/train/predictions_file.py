"""Predictions as text, and the file that they are written to as they come."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from msplora.errors import ConfigError

from .prediction import Prediction
from .stopping import Interrupted


def check_output(file: Path, force: bool, given: Path) -> None:
    """Refuse an output that exists, cannot be written, has no known suffix or is the input."""
    if file.suffix not in (".jsonl", ".tsv"):
        raise ConfigError(f"--output {file}: name it .jsonl or .tsv.")
    if file.exists() and not force:
        raise ConfigError(f"--output {file} exists; name another file, or pass --force.")
    if file.exists() and file.samefile(given):
        raise ConfigError(f"--output {file} is the file of the rows itself; name another file.")
    parent = file.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"--output {file}: {parent} is not a folder that can be written to.")


def as_texts(found: Iterable[Prediction], suffix: str) -> Iterator[str]:
    """Yield each prediction as a line of .jsonl, or of .tsv with one column per class.

    Before the first line of .tsv stand the names of its columns.
    """
    for number, its in enumerate(found):
        if suffix == ".jsonl":
            text = json.dumps(its, ensure_ascii=False)
        else:
            record = _flat(its)
            names = "" if number else "\t".join(record) + "\n"
            text = names + "\t".join(map(_cell, record.values()))
        # The name of a file need not be UTF-8.
        yield text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_predictions(found: Iterable[Prediction], file: Path) -> int:
    """Write each prediction beside `file` as it comes, then give all its name; return how many.

    Whatever ends this before, what was predicted until then stays where it was written.

    Raises:
        Interrupted: Ctrl-C. The message says where that is.
    """
    partial, count = file.with_name(file.name + ".partial"), 0
    try:
        for text in as_texts(found, file.suffix):
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("a" if count else "w", encoding="utf-8") as opened:
                    opened.write(text + "\n")
            except OSError as error:
                raise _not_written(file, error, _kept(partial, count)) from error
            count += 1
    except KeyboardInterrupt:
        said = f"Stopped by Ctrl-C. {_kept(partial, count)}"
        raise Interrupted(said, signal.SIGINT) from None
    try:
        partial.replace(file)
    except OSError as error:
        raise _not_written(file, error, _kept(partial, count)) from error
    return count


def _not_written(file: Path, error: OSError, kept: str) -> ConfigError:
    return ConfigError(
        f"--output {file} could not be written: {error}. Free some space, or name another file. "
        f"{kept}"
    )


def _kept(partial: Path, count: int) -> str:
    if count:
        return f"What was predicted until then is in {partial}: {count:,} row(s)."
    return "Nothing was predicted yet."


def _flat(found: Prediction) -> dict[str, Any]:
    probabilities = found.get("probabilities", {})
    plain = {key: value for key, value in found.items() if key != "probabilities"}
    return plain | {f"probability of {name}": value for name, value in probabilities.items()}


def _cell(value: Any) -> str:
    """A field of a TSV: nothing quotes there, so separators become visible escapes."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
