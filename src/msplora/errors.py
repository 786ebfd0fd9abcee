"""The errors msplora raises on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

UNFINISHED = ".unfinished"
"""What the name of a run's folder ends with until the run does."""


class MSPLoraError(ValueError):
    """What was asked cannot be done; the message says what was found and what to do."""

    exit_code = 1
    """What the command line exits with."""


class ConfigError(MSPLoraError):
    """A configuration that contradicts itself."""


class TargetError(MSPLoraError):
    """A target, layer index or pattern that does not fit the model."""


class AdapterFileError(MSPLoraError):
    """An adapter's tensors are missing, left over, misshapen or not finite."""


class TensorsError(AdapterFileError):
    """The tensors are not those of this config on this base, whichever of the three is at fault."""


class BaseModelError(MSPLoraError):
    """A base model or tokenizer cannot be loaded, or not all of its weights can."""


class UnsupportedError(MSPLoraError):
    """Something PEFT offers for plain LoRA that has no meaning, or none yet, for a pyramid."""


def nearest(wanted: str, known: Iterable[str], count: int = 3) -> str:
    """Return ``" Did you mean …?"`` for the closest of `known`, or an empty string."""
    matches = difflib.get_close_matches(wanted, list(dict.fromkeys(known)), n=count, cutoff=0.5)
    if not matches:
        return ""
    return " Did you mean " + " or ".join(repr(match) for match in matches) + "?"


def nearest_path(wanted: Path, pattern: str = "*") -> str:
    """The same of what lies beside a path, by its name alone: all beside it have the folder.

    A run that was stopped lies there under a name of its own.
    """
    if stopped := stopped_run(wanted):
        return stopped
    folder = wanted.parent
    beside = [its.name for its in folder.glob(pattern)] if folder.is_dir() else []
    matches = difflib.get_close_matches(wanted.name, beside, n=1, cutoff=0.6)
    return f" Did you mean {str(folder / matches[0])!r}?" if matches else ""


def stopped_run(wanted: Path) -> str:
    """What to say of a folder that a run would have made; empty if there is no such run."""
    stopped = wanted.with_name(f"{wanted.name}{UNFINISHED}") if wanted.name else wanted
    if stopped == wanted or not stopped.is_dir():
        return ""
    return f" {str(stopped)!r} is unfinished: continue it with msplora train --resume."
