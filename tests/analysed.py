"""Adapters to analyse, how to spoil them, and the dense updates in their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import msplora
from msplora.analysis.stored import StoredKind
from msplora.errors import MSPLoraError

WEIGHTS = "adapter_model.safetensors"


def update(kind: StoredKind, place: int) -> Any:
    """The dense update of one layer, by the stored pairs."""
    pairs = [kind.pairs[its] for its in kind.sites[place].pairs]
    factors = [pair.read() for pair in pairs]
    return sum(
        pair.scale * b_OR.double() @ a_RI.double()
        for pair, (a_RI, b_OR) in zip(pairs, factors, strict=True)
    )


def save(model: Any, folder: Path, base: Any = None) -> Path:
    model.save_pretrained(folder / "adapter")
    if base is not None:
        base.save_pretrained(folder / "base")
    return folder / "adapter"


def edit(adapter: Path, **changes: Any) -> None:
    """Change fields of an adapter's config."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(*arguments: Any, match: str, **options: Any) -> None:
    with pytest.raises(MSPLoraError, match=match) as raised:
        msplora.analyse(*arguments, **options)
    assert "\n" not in str(raised.value)
