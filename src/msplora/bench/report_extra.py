"""Name the extra to install where the page's libraries are missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from msplora.errors import MSPLoraError

_MODULES = frozenset({"jinja2", "matplotlib"})


@contextmanager
def report_extra() -> Iterator[None]:
    """Turn a failed import of jinja2 or matplotlib into an error that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _MODULES:
            raise
        raise MSPLoraError(
            f"this command needs {missing}, which is not installed: pip install 'msplora[report]'"
        ) from None
