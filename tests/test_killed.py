"""A run that SIGKILL ends at any moment, while it saves too, goes on to the same bits.

Three random moments for each task, and some that are chosen. `make interruptions` tries a dozen and
keeps the log.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from killed_runs import after, config, kill_when, run_to_its_end, save_bases, start, what_was_found
from msplora.bench.provenance import provenance
from msplora.train.checkpoints import WRITING

pytestmark = pytest.mark.slow
TASKS = ("classification", "sft")
LOG = os.environ.get("MSPLORA_KILLS_LOG")
"""A file to note down each kill in; with it a dozen random moments are tried, not three."""
MOMENTS: list[int | str] = [*range(12 if LOG else 3), "saving", "removing", "writing the result"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def straight(
    bases: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Any, float]]:
    """What a run that nobody interrupts finds, and the seconds that it takes."""
    known: dict[str, tuple[Any, float]] = {}

    def found(task: str) -> tuple[Any, float]:
        if task not in known:
            run = tmp_path_factory.mktemp("straight") / "run"
            assert run_to_its_end(config(bases, task, run, epochs=1)) == 0  # the imports are over
            run = run.with_name("straight")
            begin = time.monotonic()
            assert run_to_its_end(config(bases, task, run, save_steps=1)) == 0
            known[task] = what_was_found(run), time.monotonic() - begin
        return known[task]

    return found


def note(record: dict[str, Any]) -> None:
    if LOG:
        origin = provenance("cpu") | {"command": "make interruptions"}
        with Path(LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(record | origin) + "\n")


def state_of(run: Path) -> str:
    """What a run had left where it was killed."""
    if run.exists():
        return "the run in its place"
    working = run.with_name(run.name + ".unfinished")
    if not working.exists():
        return "nothing yet"
    names = [its.name for its in (working / "checkpoints").glob("*")]
    names += ["the result"] if (working / "adapter").exists() else []
    return ", ".join(sorted(names)) or "no checkpoint yet"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_a_run_ends_in_the_same_bits(
    bases: Path, straight: Callable[[str], Any], tmp_path: Path, task: str, moment: int | str
) -> None:
    expected, seconds = straight(task)
    content = config(bases, task, tmp_path / "run", save_steps=1)
    working = tmp_path / "run.unfinished"
    seen = {
        "saving": lambda: (working / "checkpoints" / WRITING).exists(),
        "removing": lambda: any((working / "checkpoints").glob(".removing-*")),
        "writing the result": lambda: (working / "adapter").exists(),
    }
    # The first quarter of the time goes into reading the model and the data.
    at = random.Random(f"{task} {moment}").uniform(seconds / 4, seconds)
    process = start(content)
    killed = kill_when(process, seen[moment] if isinstance(moment, str) else after(at))
    assert killed or moment not in ("saving", "writing the result")
    found = state_of(tmp_path / "run")
    # And once more, where the run that goes on still has something to save.
    again = kill_when(start(content), seen["saving"])
    found_again = state_of(tmp_path / "run")
    assert run_to_its_end(content) == 0
    same = what_was_found(tmp_path / "run") == expected
    note(
        {
            "task": task,
            "moment": moment if isinstance(moment, str) else f"{at:.2f} of {seconds:.2f} s",
            "killed": killed,
            "found": found,
            "killed_again": again,
            "found_again": found_again,
            "same_bits": same,
        }
    )
    assert same
    assert sorted(its.name for its in tmp_path.iterdir()) == ["run", "run.log"]
