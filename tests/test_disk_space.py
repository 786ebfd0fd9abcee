"""The room that a run asks for on the disk is that of what it saves, and not of what trains."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from msplora.train.disk_space import DiskTooSmall, check_space, optimiser_bytes
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


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit", "adafactor", "sgd"])
def test_room_is_asked_for_what_the_optimiser_keeps(tmp_path: Path, optimizer: str) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    model = nn.ParameterDict(
        {
            "matrix": torch.ones(64, 100),
            "stack": torch.ones(3, 5, 7),
            "vector": torch.ones(9),
            "frozen": nn.Parameter(torch.ones(4), requires_grad=False),
        }
    )
    arguments = hf.TrainingArguments(
        output_dir=str(tmp_path), optim=optimizer, report_to=[], use_cpu=True
    )
    make, options = hf.Trainer.get_optimizer_cls_and_kwargs(arguments)
    made = make([its for its in model.parameters() if its.requires_grad], **options)
    sum(its.square().sum() for its in model.values() if its.requires_grad).backward()
    made.step()
    kept = [its for state in made.state.values() for its in state.values()]
    tensors = {id(its): its for its in kept if isinstance(its, torch.Tensor) and its.dim()}
    exact = sum(its.nbytes for its in tensors.values())
    near = 0.1 if optimizer == "adamw_8bit" else 0  # of the maps of its 8 bits, which tensors share
    assert optimiser_bytes(model, optimizer) == pytest.approx(exact, rel=near)
