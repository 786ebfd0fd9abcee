"""What the runs of all engines share: the cases they are given, and the files they leave."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Asked:
    """One base, one converted adapter of it, one row of tokens."""

    base: str
    """The folder, or for llama.cpp the file, of the base."""
    adapter: str
    ids: list[int]


def answer(
    logits: Callable[[Asked, bool], Any], ran: str, packages: Iterable[str], **more: str
) -> None:
    """Write the logits (tokens, vocabulary) of the base and of the adapted model of each case.

    The cases are in the JSON file that is the only argument: base, adapter, ids, and out.

    Args:
        logits: what makes them, without and with the adapter.
        ran: what was run, in words.
        packages: whose versions belong to the result.
        more: other versions.
    """
    for case in json.loads(Path(sys.argv[1]).read_text()):
        asked = Asked(case["base"], case["adapter"], case["ids"])
        arrays = {
            name: np.asarray(logits(asked, adapter), dtype=np.float32)
            for name, adapter in (("base", False), ("adapted", True))
        }
        np.savez(case["out"], **arrays)
    versions = {name: version(name) for name in packages} | more
    print(json.dumps({"ran": ran, "engine_versions": versions}))
