"""The room that a run asks for on the disk is that of what it saves, and not of what trains."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest

from msplora.train.disk_space import DiskTooSmall, check_space
from msplora.train.job import Job
from msplora.train.run import prepare_job
from msplora.train.settings_file import make_settings
from runs import config_on, save_bases, tensors

OWN: dict[str, Any] = {"vera": {"r": 16}, "randlora": {"r": 4}, "lily": {"r": 4, "stride_A": 2}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bases(tmp_path_factory.mktemp("bases"))


def job_of(bases: Path, task: str, method: str) -> Job:
    targets = ["query", "value"] if task == "classification" else ["q_proj", "v_proj"]
    asked = config_on(bases, task, method=method, adapter={"target_modules": targets})
    if method in OWN:
        asked[method] = OWN[method]
    return prepare_job(make_settings(asked, "a test"))


@pytest.mark.parametrize("task", ["sft", "classification"])
@pytest.mark.parametrize("method", ["msplora", "adalora", "elalora", *OWN])
def test_room_is_asked_for_all_that_is_saved(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, method: str
) -> None:
    if method == "lily" and not hasattr(peft, "LilyConfig"):
        pytest.skip("new in PEFT 0.19")
    job = job_of(bases, task, method)
    job.adapted.model.save_pretrained(str(tmp_path / "adapter"))
    saved = sum(its.nbytes for its in tensors(tmp_path / "adapter").values())
    trained = 4 * job.adapted.trainable.total
    assert (saved > trained) is (method in OWN)
    moments = 2 * trained + (2 * 4 * job.adapted.trainable.adapter if method == "elalora" else 0)
    checkpoint = saved + moments
    usage = shutil.disk_usage(tmp_path)

    def notes(free: int) -> list[str]:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        return check_space(job, tmp_path / "run")

    with pytest.raises(DiskTooSmall, match="a checkpoint takes about"):
        notes(checkpoint + saved - 1)
    kept = job.record.settings.training.save_limit + 2
    assert notes(checkpoint + saved)
    assert notes(kept * checkpoint + saved - 1)
    assert not notes(kept * checkpoint + saved)
