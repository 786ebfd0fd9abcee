"""The regular expressions in a config, tried before anything is matched by them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .errors import ConfigError

# Field -> what PEFT puts an entry into before it matches.
_PUT_INTO = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
_LITERAL_IN_A_LIST = ("target_modules", "exclude_modules")


def check_patterns(config: Any) -> None:
    """Refuse names that could not be meant: a pattern that is none, a word taken for a list.

    Raises:
        ConfigError: a field of `config` holds one.
    """
    if isinstance(config.modules_to_save, str):
        raise ConfigError(
            f"modules_to_save = {config.modules_to_save!r}: give a list of names, "
            f"[{config.modules_to_save!r}]."
        )
    for field in _PUT_INTO:
        for pattern in _patterns(field, getattr(config, field)):
            whole = _PUT_INTO[field].format(pattern)
            try:
                re.compile(whole)
            except re.error as error:
                matched = "" if whole == pattern else f" (PEFT matches by {whole!r})"
                alone = getattr(config, field) == pattern
                raise ConfigError(
                    f"{field} holds {pattern!r}, which is read as a regular expression, and it is "
                    f"none{matched}: {error}. Correct it"
                    f"{', or give a list of names' if alone else ''}."
                ) from error


def _patterns(field: str, value: Any) -> Iterable[str]:
    """What of a field's value is read as a regular expression; of a mapping, its keys."""
    if isinstance(value, str):
        return [value]
    return [] if field in _LITERAL_IN_A_LIST else value or []
