"""An adapter's config, read and checked before anything is computed of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import AdapterFileError, UnsupportedError
from .loading import CONFIG_FILE, read_config
from .released import is_released
from .to_mlx import MLX_FILE


def read_json(file: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        AdapterFileError: it does not.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{str(file)!r} cannot be read: {error}") from error
    return content


def lora_or_pyramid(folder: Path, done: str) -> Any:
    """PEFT's config of a LoRA or a pyramid.

    Args:
        folder: the adapter's.
        done: what is done with adapters, as a participle, for the message.

    Raises:
        AdapterFileError: a field is missing, or holds what it cannot.
        UnsupportedError: it is another method's or another program's.
    """
    file = folder / CONFIG_FILE
    content = read_json(file)
    if (folder / MLX_FILE).is_file() or "fine_tune_type" in content:
        raise UnsupportedError(
            f"{str(folder)!r} holds a LoRA for mlx-lm ({MLX_FILE}), which is not read here. "
            f"Give the folder that it was converted from."
        )
    if is_released(folder):
        raise UnsupportedError(
            f"{str(folder)!r} is a checkpoint of the code released with the paper: its pairs do "
            f"not all act. Convert it first: msplora convert {folder} OUT --to msplora."
        )
    method = content.get("peft_type")
    if not isinstance(method, str):
        raise AdapterFileError(
            f"{str(file)!r} does not say which method it is of: peft_type is {method!r}, where "
            f"'LORA' or 'MSPLORA' is needed. The file is damaged; copy it again."
        )
    if method not in ("LORA", "MSPLORA"):
        raise UnsupportedError(
            f"{str(folder)!r} is a {method} adapter. What can be {done} are adapters of LORA and "
            f"MSPLORA."
        )
    _check_fields(file, content, is_pyramid=method == "MSPLORA")
    return read_config(folder)


def _check_fields(file: Path, content: dict[str, Any], is_pyramid: bool) -> None:
    """Refuse values that figures are computed of, and that neither PEFT nor the config refuses."""
    for name, (fits, wanted) in _FIELDS.items():
        value = content.get(name)
        # A LoRA needs these two, which a pyramid's config can derive; null elsewhere is "not set".
        if name not in content or (value is None and (is_pyramid or name not in _NEEDED)):
            continue
        if not fits(value):
            raise AdapterFileError(
                f"{str(file)!r}: {name} is {value!r}, and has to be {wanted}. The file is damaged "
                f"or was changed; copy it again."
            )


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_numbers(value: Any) -> bool:
    return all(type(its) is int for its in (value if isinstance(value, list) else [value]))


def _is_names(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and all(map(_is_text, value)))


def _patterns(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether something maps regular expressions, as PEFT matches them, to values that fit."""

    def are(value: Any) -> bool:
        if not isinstance(value, dict):
            return False
        try:
            return all(re.compile(rf"(.*\.)?({key})$") and fits(its) for key, its in value.items())
        except re.error:
            return False

    return are


_NEEDED = ("r", "lora_alpha")
_RANK, _ALPHA = "a whole number, 1 or more", "a finite number"
_NAMES = "a name or a list of names"
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, _RANK),
    "lora_alpha": (_is_alpha, _ALPHA),
    "rank_pattern": (_patterns(_is_rank), f"regular expressions, each with {_RANK}"),
    "alpha_pattern": (_patterns(_is_alpha), f"regular expressions, each with {_ALPHA}"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "layers_to_transform": (_is_numbers, "the number of a block, or a list of them"),
    "layers_pattern": (_is_names, _NAMES),
    "target_modules": (_is_names, _NAMES),
    "target_parameters": (_is_names, _NAMES),
    "base_model_name_or_path": (_is_text, "a name or a path"),
    "model_type": (_is_text, "a name"),
    "task_type": (_is_text, "a name"),
    "revision": (_is_text, "a name"),
}
