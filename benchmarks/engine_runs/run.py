"""What the runs of all engines share: their arguments, and the file they leave."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
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
    """Write the logits (tokens, vocabulary) of the base and of the adapted model.

    Args:
        logits: what makes them, without and with the adapter.
        ran: what was run, in words.
        packages: whose versions belong to the result.
        more: other versions.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--ids", type=json.loads, required=True)
    parser.add_argument("--out", required=True)
    found = parser.parse_args()
    asked = Asked(found.base, found.adapter, found.ids)
    arrays = {
        name: np.asarray(logits(asked, adapter), dtype=np.float32)
        for name, adapter in (("base", False), ("adapted", True))
    }
    np.savez(found.out, **arrays)
    versions = {name: version(name) for name in packages} | more
    print(json.dumps({"ran": ran, "engine_versions": versions}))
