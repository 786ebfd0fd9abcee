"""The local paths among a run's settings made absolute, so that they hold from any folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from msplora.errors import MSPLoraError
from msplora.loading import resolve_source

from .data_sources import absolute_sources
from .settings import Settings
from .settings_data import DataSettings


def with_absolute_paths(settings: Settings, must_exist: bool = True) -> Settings:
    """The settings with every local path made absolute.

    Without `must_exist`, a model or a pattern of files that is not there stays as it is.
    """
    settings = settings.model_copy(deep=True)
    for key, made_absolute in PATHS.items():
        section, _, name = key.rpartition(".")
        its = getattr(settings, section) if section else settings
        if getattr(its, name):
            with nullcontext() if must_exist else suppress(MSPLoraError):
                setattr(its, name, made_absolute(getattr(its, name)))
    return settings


def absolute_value(key: str, value: Any) -> Any:
    """The value of a key of `PATHS` as a file may hold it, made absolute if it is there."""
    section, _, name = key.rpartition(".")
    with suppress(MSPLoraError):
        if not value or section != "data":
            return value and PATHS[key](value)
        data = DataSettings.model_validate({name: value})
        setattr(data, name, PATHS[key](getattr(data, name)))
        return data.model_dump(mode="json")[name]
    return value


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


PATHS: dict[str, Callable[[Any], Any]] = {
    "model": resolve_source,
    "tokenizer": partial(resolve_source, what="tokenizer"),
    "output": _absolute,
    "init_from": _absolute,
    "data.train": partial(absolute_sources, key="data.train"),
    "data.validation": partial(absolute_sources, key="data.validation"),
    "data.path": _absolute,
    "data.chat_template": _absolute,
}
"""Dotted keys that name something on this machine or, some of them, on the hub."""
