"""Where the long verbs say how they are getting on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def progress_console() -> Console:
    """Return the terminal, or a console that prints nothing under `msplora -q`."""
    from rich.console import Console

    return Console(quiet=not logging.getLogger("msplora").isEnabledFor(logging.INFO))
