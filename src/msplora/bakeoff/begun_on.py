"""On what a run is made: the commit, the machine and the versions, as they are when it begins."""

from __future__ import annotations

from pathlib import Path

from msplora.bench.provenance import commit, hardware
from msplora.sweep.rows import Row
from msplora.train.interrupted import goes_on
from msplora.train.run_folder import RUN
from msplora.train.settings import Settings
from msplora.versions import versions


def note_origin(row: Row, settings: Settings) -> None:
    """Write into its row on what a run begins: what is committed while it trains is not of it.

    Of a run that goes on, what it was begun on is kept too. One that is whole, as after a kill
    between its end and its row's, stays what it was made on.
    """
    output = Path(settings.output)
    working = output.with_name(f"{output.name}.unfinished")
    trains = (working / "checkpoints").exists()
    if not trains and any((folder / RUN).is_file() for folder in (output, working)):
        return
    now = {"commit": commit(), "hardware": hardware(), "versions": versions()}
    before = {"commit": row.commit, "hardware": row.hardware, "versions": row.versions}
    if not goes_on(settings):
        row.earlier = []
    elif before != now and before not in row.earlier:
        row.earlier.append(before)
    row.commit, row.hardware, row.versions = now["commit"], now["hardware"], now["versions"]
