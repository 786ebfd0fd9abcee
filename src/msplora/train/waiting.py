"""A bar for long work that comes before training, on the terminal only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_WORTH_A_BAR = 2000
"""Less than so many rows are done before anyone could read the bar."""


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield what moves the bar on; nothing is shown to a file, nor under `msplora -q`."""
    console = Console(stderr=True)
    shown = logging.getLogger("msplora").isEnabledFor(logging.INFO)
    if total < _WORTH_A_BAR or not console.is_terminal or not shown:
        yield lambda _: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
