"""Name the extra to install where a verb's libraries are missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from msplora.errors import MSPLoraError

# Top-level modules that the extra brings, beyond what the core needs.
_MODULES = frozenset(
    {"accelerate", "datasets", "matplotlib", "pydantic", "scipy", "sklearn", "trl", "yaml"}
)


@contextmanager
def train_extra() -> Iterator[None]:
    """Turn a failed import of the training libraries into an error that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _MODULES:
            raise
        raise MSPLoraError(
            f"this command needs {missing}, which is not installed: pip install 'msplora[train]'"
        ) from None
