"""Shared by all tests: no network, and the data beside the repository where it is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """The folder of reference vectors and real data, which lies beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the reference vectors and data are not beside this repository")
    return SHARED


@pytest.fixture(autouse=True, scope="session")
def _two_workers_share_two_cores() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of an adapter of a tiny Llama."""
    from adapted_llama import adapted

    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"
