"""Fine-tune transformers with pyramids of shared low-rank adapters (MSPLoRA).

Importing this package registers the tuner with PEFT: at once where PEFT is already loaded, else
at the moment it is. It imports neither torch nor PEFT itself; public names are loaded when used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> the module that owns it.
_PUBLIC = {
    "MSPLoraConfig": "config",
    "analyse": "analysis.analysing",
    "MSPLoraModel": "model",
    "MSPLoraError": "errors",
    "Level": "pyramid",
    "Pair": "pyramid",
    "Plan": "pyramid",
    "Site": "pyramid",
    "plan": "planning",
    "factors": "store",
    "hotswap": "swapping",
    "doctor": "diagnosis.doctoring",
    "inspect": "inspection.inspecting",
    "singular_values": "spectrum",
    "to_lora": "convert",
    "to_merged": "convert",
    "to_msplora": "from_lora",
}

__all__ = [*sorted(_PUBLIC), "__version__"]

if TYPE_CHECKING:
    from .analysis.analysing import analyse as analyse
    from .config import MSPLoraConfig as MSPLoraConfig
    from .convert import to_lora as to_lora
    from .convert import to_merged as to_merged
    from .diagnosis.doctoring import doctor as doctor
    from .errors import MSPLoraError as MSPLoraError
    from .from_lora import to_msplora as to_msplora
    from .inspection.inspecting import inspect as inspect
    from .model import MSPLoraModel as MSPLoraModel
    from .planning import plan as plan
    from .pyramid import Level as Level
    from .pyramid import Pair as Pair
    from .pyramid import Plan as Plan
    from .pyramid import Site as Site
    from .spectrum import singular_values as singular_values
    from .store import factors as factors
    from .swapping import hotswap as hotswap


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


from . import registering as _registering  # noqa: E402  (needs nothing above, but runs last)


def _register() -> None:
    from . import _peft

    _peft.register_method()


_registering.install(_register)
