"""Systems that MSPLoRA is compared with and that PEFT does not have: Hydra and ElaLoRA.

Importing this package registers them with PEFT, as importing msplora registers MSPLoRA: at once
where PEFT is loaded, else at the moment it is. `import msplora` alone does not. Code that reads a
config calls `register`, for it may be imported while another module is half-way through its import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from msplora import registering as _registering

# Public name -> the module that owns it.
_PUBLIC = {
    "ElaLoraConfig": "elalora.config",
    "ElaLoraModel": "elalora.model",
    "HydraConfig": "hydra.config",
    "HydraModel": "hydra.model",
    "MoveRanks": "elalora.moving",
    "RankMover": "elalora.moving",
}

__all__ = sorted([*_PUBLIC, "register"])

if TYPE_CHECKING:
    from .elalora.config import ElaLoraConfig as ElaLoraConfig
    from .elalora.model import ElaLoraModel as ElaLoraModel
    from .elalora.moving import MoveRanks as MoveRanks
    from .elalora.moving import RankMover as RankMover
    from .hydra.config import HydraConfig as HydraConfig
    from .hydra.model import HydraModel as HydraModel


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def register() -> None:
    """Tell PEFT both methods now; a second call does nothing."""
    from msplora import _peft

    from .elalora.config import ElaLoraConfig
    from .elalora.model import ElaLoraModel
    from .hydra.config import HydraConfig
    from .hydra.model import HydraModel

    _peft.register("hydra", HydraConfig, HydraModel)
    _peft.register("elalora", ElaLoraConfig, ElaLoraModel)


_registering.install(register, asking=__name__)
