"""Register tuners the moment PEFT is there, without importing PEFT ourselves.

`import msplora`, and `import msplora.sisters`, have to stay quick, and they may run before or after
`import peft`, or from the middle of either. So a finder watches imports: whenever PEFT, or a module
of this package, has finished loading, it looks whether the tuners can be registered, and steps
aside once they have been.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_PACKAGE = __name__.rpartition(".")[0]


def install(register: Callable[[], None], asking: str = _PACKAGE) -> None:
    """Register now if PEFT is loaded, else when it is.

    Args:
        register: does it; it may import PEFT, and modules of this package.
        asking: the package that calls, which may be half-way through its own import.
    """
    finder = _AfterImport(register, asking)
    if not finder.try_to_register():
        sys.meta_path.insert(0, finder)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs `try_to_register` after each module that could complete the picture is executed."""

    def __init__(self, register: Callable[[], None], asking: str) -> None:
        self._register = register
        self._asking = asking
        self._looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if self._looking or not (fullname == "peft" or fullname.startswith(f"{_PACKAGE}.")):
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self)  # pyright: ignore[reportAttributeAccessIssue]
        return spec

    def try_to_register(self) -> bool:
        """Register if PEFT is loaded and nothing of ours is half-way through its import."""
        if not _is_loaded("peft") or any(
            _is_loading(name)
            for name in list(sys.modules)
            if name.startswith(f"{_PACKAGE}.") and name != self._asking
        ):
            return False
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        self._register()
        return True


class _ThenRegister(importlib.abc.Loader):
    """The module's own loader, then the look whether to register."""

    def __init__(self, loader: Any, finder: _AfterImport) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        # The import system marks the module as loaded only after this returns.
        spec = module.__spec__
        if spec is not None:
            spec._initializing = False  # pyright: ignore[reportAttributeAccessIssue]
        if self._finder in sys.meta_path:
            self._register()

    def _register(self) -> None:
        try:
            self._finder.try_to_register()
        except Exception as error:
            # Whoever imports PEFT may not even know of us (`autoload.py`): it has to go on.
            warnings.warn(
                f"msplora cannot register its adapters with this PEFT: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )


def _is_loading(name: str) -> bool:
    module = sys.modules.get(name)
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _is_loaded(name: str) -> bool:
    return name in sys.modules and not _is_loading(name)
