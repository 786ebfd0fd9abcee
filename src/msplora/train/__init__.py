"""Training runs: the work behind `msplora train`, `eval`, `predict`, `generate` and `demo`.

What is of use in a trainer of one's own stands here; it is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

# Public name -> the module that owns it.
_PUBLIC = {
    "LevelNorms": "level_norms",
    "Stage": "stages",
    "StagedTraining": "stages",
    "freeze_levels": "levels",
    "level_parameters": "levels",
    "parameter_groups": "learning_rates",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from .learning_rates import parameter_groups as parameter_groups
    from .level_norms import LevelNorms as LevelNorms
    from .levels import freeze_levels as freeze_levels
    from .levels import level_parameters as level_parameters
    from .stages import Stage as Stage
    from .stages import StagedTraining as StagedTraining


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from msplora.extras import train_extra

    with train_extra():
        value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
