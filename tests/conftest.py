"""Shared by all tests: no network, and the data beside the repository where it is there."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from bake_offs import MadeUp

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell lets what it starts in the background ignore Ctrl-C; runs leave it so, and tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture
def pyramid(tmp_path: Path) -> Path:
    """The folder of an adapter of a tiny Llama, as small as one that was trained."""
    from adapted_llama import adapted
    from inspected import scaled

    scaled(adapted()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture(scope="session")
def _bake_off_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from runs import labelled_rows, save_encoder, write_jsonl

    folder = tmp_path_factory.mktemp("bake-off")
    save_encoder(folder / "encoder")
    write_jsonl(folder / "one.jsonl", labelled_rows(40))
    write_jsonl(folder / "two.jsonl", labelled_rows(44))
    return folder


@pytest.fixture
def bake_off_folder(_bake_off_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the model and the rows that the bake-off of the tests names."""
    for file in _bake_off_files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MadeUp:
    """Runs of bake-offs, started in the current folder, that are made up."""
    from bake_offs import MadeUp
    from msplora.bakeoff import engines

    monkeypatch.chdir(tmp_path)
    runs = MadeUp()
    monkeypatch.setattr(engines, "make_run", runs)
    monkeypatch.setattr(engines, "note_origin", runs.note_origin)
    return runs
