"""A dry run foresees what a real run takes: its oracle is the same steps on real weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import BatchSampler

from msplora.errors import ConfigError, MSPLoraError
from msplora.train.base_model import base_without_weights
from msplora.train.devices import planned
from msplora.train.dry_run import DryRun, disk_use, dry_run
from msplora.train.dry_run_report import verdict
from msplora.train.estimate import estimate
from msplora.train.job import Job
from msplora.train.memory_trace import Held
from msplora.train.run import prepare_job
from msplora.train.settings import Settings
from msplora.train.settings_file import make_settings, read_settings
from msplora.train.target import CPU_LIBRARIES, CPU_SLACK, CUDA_CONTEXT, GIB, find_target
from msplora.train.trainer_arguments import training_steps
from runs import (
    answered_rows,
    labelled_rows,
    msplora,
    save_decoder,
    save_encoder,
    tree,
    write_config,
    write_jsonl,
)

CLOSE = 0.01
"""How far an estimate may be off here; the promise is 0.10."""


@pytest.fixture(autouse=True)
def same_kernels_on_every_processor() -> Iterator[None]:
    """oneDNN takes memory in passing for products in half precision, by the CPU's instructions."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases that are wide enough for their activations to count, and rows."""
    folder = tmp_path_factory.mktemp("dry-run")
    save_encoder(folder / "encoder", layers=2, hidden_size=64, intermediate_size=128)
    save_decoder(folder / "decoder", layers=2, hidden_size=64, intermediate_size=128)
    write_jsonl(folder / "labelled.jsonl", labelled_rows(64))
    write_jsonl(folder / "answered.jsonl", answered_rows(64))
    write_jsonl(
        folder / "preferred.jsonl",
        [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " w1 w2"}
            for row in answered_rows(64)
        ],
    )
    return folder


DATA = {"classification": "labelled", "sft": "answered", "dpo": "preferred"}


def config(folder: Path, task: str = "classification", **changes: Any) -> dict[str, Any]:
    """A run's config; keys of sections with two underscores between, as in training__packing."""
    classifies = task == "classification"
    content: dict[str, Any] = {
        "model": str(folder / ("encoder" if classifies else "decoder")),
        "task": task,
        "output": str(folder / "run"),
        "data": {"train": str(folder / f"{DATA[task]}.jsonl")},
        "adapter": {"target_modules": ["query", "value"] if classifies else ["q_proj", "v_proj"]},
    }
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (content.setdefault(section, {}) if section else content)[name] = value
    return content


def foreseen(folder: Path, task: str = "classification", real: bool = False, **changes: Any) -> Any:
    settings = make_settings(config(folder, task, **changes), "test")
    return dry_run(settings, "cpu", real=real)


def without_weights(settings: Settings, on_gpu: bool = False) -> Job:
    with torch.device("meta"):
        return prepare_job(settings, partial(base_without_weights, on_gpu=on_gpu))


SFT = "sft"
PAIRS = {"training__batch_size": 2, "training__eval_batch_size": 2}
ALL = {"adapter__target_modules": "all-linear"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "classifier, dropout": ("classification", {**ALL, "adapter__lora_dropout": 0.1}),
    "sft": (SFT, {}),
    "half precision, checkpointed": (
        SFT, {**ALL, "dtype": "bfloat16", "training__gradient_checkpointing": True}
    ),
}  # fmt: skip
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("classification", {"method": "lora"}),
    "frozen": ("classification", {"method": "frozen"}),
    "dora": (SFT, {"adapter__use_dora": True}),
    "everything, accumulated": (
        SFT, {"method": "full", "training__batch_size": 4, "training__gradient_accumulation": 4}
    ),
    "everything in half precision": (SFT, {"method": "full", "dtype": "bfloat16"}),
    "packed": (SFT, {"training__packing": True, "data__max_length": 16}),
    "evaluation is the peak": ("classification", {"training__batch_size": 1}),
    "one short row": (SFT, {"training__batch_size": 1}),
    "nothing held out": (SFT, {"data__validation_fraction": 0}),
    "preferences over a second model": ("dpo", {"method": "full", **PAIRS}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_what_is_measured(case: str, folder: Path) -> None:
    task, changes = CASES[case]
    assert_close(foreseen(folder, task, real=True, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_the_estimate_is_what_is_measured_of_more(case: str, folder: Path) -> None:
    task, changes = MORE[case]
    assert_close(foreseen(folder, task, real=True, **changes))


def assert_close(found: DryRun) -> None:
    assert found.measured
    assert found.estimate.training.total == pytest.approx(found.measured.training, rel=CLOSE)
    if found.measured.evaluation is None:
        assert found.estimate.evaluation is None
    else:
        assert found.estimate.evaluation
        its = found.estimate.evaluation.total
        assert its == pytest.approx(found.measured.evaluation, rel=CLOSE)
    assert found.error == pytest.approx(0, abs=CLOSE)
    assert sum(found.estimate.training.parts.values()) == found.estimate.training.total


@pytest.mark.parametrize("method", ["msplora", "lora", "full", "frozen", "randlora", "lily"])
def test_trainable_numbers_and_files_are_the_real_ones(
    method: str, folder: Path, tmp_path: Path
) -> None:
    if method == "lily" and not hasattr(peft, "LilyConfig"):
        pytest.skip("new in PEFT 0.19")
    settings = make_settings(config(folder, method=method), "test")
    found, job = without_weights(settings), prepare_job(settings)
    assert found.adapted.trainable == job.adapted.trainable
    assert found.base.head == job.base.head
    job.adapted.model.save_pretrained(tmp_path)
    with safe_open(next(tmp_path.glob("*.safetensors")), framework="pt") as file:
        saved = sum(its.nbytes for its in map(file.get_tensor, file.keys()))
    disk = disk_use(found)
    assert disk.weights == saved
    assert disk.checkpoint - disk.weights == 8 * found.adapted.trainable.total


def test_a_pooler_that_the_checkpoint_lacks_trains_in_both(tmp_path: Path, folder: Path) -> None:
    save_encoder(tmp_path / "encoder")  # of a language model: no pooler
    settings = make_settings(config(folder, model=str(tmp_path / "encoder")), "test")
    job = prepare_job(settings)
    assert any("pooler" in name for name in job.base.head)
    assert without_weights(settings).adapted.trainable == job.adapted.trainable


def test_a_run_that_starts_from_an_adapter(folder: Path, tmp_path: Path) -> None:
    first = prepare_job(make_settings(config(folder, adapter__r=16), "test"))
    first.adapted.model.save_pretrained(tmp_path / "adapter")
    settings = make_settings(config(folder, init_from=str(tmp_path / "adapter")), "test")
    found = dry_run(settings, "cpu")
    assert found.trainable.adapter == first.adapted.trainable.adapter
    assert found.estimate.training.parts[Held.TRAINED] >= 4 * found.trainable.total


@pytest.mark.slow
def test_preferences_over_the_adapter_that_the_run_starts_from(
    folder: Path, tmp_path: Path
) -> None:
    first = prepare_job(make_settings(config(folder, SFT), "test"))
    first.adapted.model.save_pretrained(tmp_path / "adapter")
    start = {"init_from": str(tmp_path / "adapter"), **PAIRS}
    found = foreseen(folder, "dpo", real=True, **start)
    assert_close(found)
    second = found.estimate.training.parts[Held.FROZEN] - frozen_bytes(first)
    assert second == 4 * found.trainable.adapter


def frozen_bytes(job: Job) -> int:
    frozen = (*job.adapted.model.parameters(), *job.adapted.model.buffers())
    return sum(its.nbytes for its in frozen if not its.requires_grad)


def test_no_weight_is_needed_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder / "decoder", tmp_path / "decoder")
    for file in (tmp_path / "decoder").glob("*.safetensors"):
        file.unlink()
    content = config(folder, SFT, model=str(tmp_path / "decoder"), output=str(tmp_path / "run"))
    file = write_config(tmp_path / "run.yaml", content)
    before = tree(tmp_path)
    result = msplora("train", file, "--dry-run", "--device", "24GB", "--json")
    assert result.code == 0, result.err
    assert tree(tmp_path) == before
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.unfinished").exists()
    assert result.json()["fits"] is True
    assert result.json()["trainable"] == foreseen(folder, SFT).to_dict()["trainable"]
    with pytest.raises(MSPLoraError):
        prepare_job(read_settings(file))  # a real run does need them


@pytest.mark.slow
def test_what_does_not_fit_says_so_and_what_would_help(folder: Path, tmp_path: Path) -> None:
    frugal = {"dtype": "bfloat16", "training__gradient_checkpointing": True}
    content = config(folder, training__batch_size=32, **frugal)
    file = write_config(tmp_path / "run.yaml", content)
    result = msplora("train", file, "--dry-run", "--device", "cpu:100KB", "--json")
    assert result.code == 1  # no such unit
    result = msplora("train", file, "--dry-run", "--device", "cpu:0.1MB", "--json")
    assert result.code == 3
    found = result.json()
    assert found["fits"] is False
    assert found["remedies"][0]["changes"] == {
        "training.batch_size": 16,
        "training.gradient_accumulation": 2,
    }
    assert found["remedies"][0]["needed"] < found["needed"]


@pytest.mark.thorough
def test_a_remedy_takes_what_a_run_with_it_takes(folder: Path) -> None:
    settings = make_settings(config(folder, training__batch_size=32), "test")
    found = dry_run(settings, "cpu:1MB")
    tried = [its.changes for its in found.remedies]
    assert {"training.batch_size": 16, "training.gradient_accumulation": 2} in tried
    assert {"training.gradient_checkpointing": True} in tried
    assert {"dtype": "bfloat16"} in tried
    assert found.remedies[-1].needed == min(its.needed for its in found.remedies)
    for remedy in found.remedies:
        assert remedy.needed < found.needed
        changed = settings.model_copy(deep=True)
        for key, value in remedy.changes.items():
            section, _, name = key.rpartition(".")
            setattr(changed.training if section else changed, name, value)
        assert dry_run(changed, "cpu").needed == remedy.needed


def test_the_table_is_printed(folder: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / "run.yaml", config(folder, SFT))
    result = msplora("train", file, "--dry-run", "--device", "L4")
    assert result.code == 0, result.err
    for said in ("frozen weights", "optimiser", "logits and loss", "all tensors"):
        assert said in result.out
    assert "not measured" in result.out
    assert "of 22.0" in " ".join(result.out.split())


def test_steps_and_tokens_are_those_of_the_run(folder: Path) -> None:
    changes: dict[str, Any] = {"training__batch_size": 5, "training__gradient_accumulation": 2}
    found = foreseen(folder, SFT, **changes)
    job = prepare_job(make_settings(config(folder, SFT, **changes), "test"))
    trainer = job.make_trainer(folder / "never-written")
    loader = trainer.get_train_dataloader()
    per_epoch = trainer.set_initial_training_values(trainer.args, loader)[1]
    assert found.schedule.steps == 3 * per_epoch
    assert found.schedule.warmup_steps == trainer.args.warmup_steps
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    assert found.schedule.tokens_per_epoch == tokens


@pytest.mark.parametrize(("rows", "size", "accumulated"), [(990, 4, 1), (65, 8, 3), (3, 4, 2)])
def test_steps_are_those_of_all_processes(rows: int, size: int, accumulated: int) -> None:
    training = {"batch_size": size, "gradient_accumulation": accumulated}
    settings = make_settings({**config(Path(), SFT), "training": training}, "test")
    batches = BatchSampler(range(rows), size, drop_last=False)
    its = len(BatchSamplerShard(batches, num_processes=4, process_index=0))
    with planned(4):
        assert training_steps(settings, rows) == 3 * -(-its // accumulated)
    assert training_steps(settings, rows) == 3 * -(-len(batches) // accumulated)


def test_each_process_of_ddp_holds_the_gradients_of_all(folder: Path) -> None:
    settings = make_settings(config(folder, devices__processes=4), "test")
    found = dry_run(settings, "cpu:24GB")
    for peak in (found.estimate.training, found.estimate.evaluation):
        assert peak
        assert peak.parts[Held.BUCKETS] == 4 * found.trainable.total
        assert sum(peak.parts.values()) == peak.total
    assert found.needed == 4 * (found.estimate.peak.total + found.beside_tensors)  # of one memory
    assert found.schedule.rows_per_step == min(4 * settings.training.batch_size, 58)
    assert found.schedule.steps == 3
    assert verdict(found).endswith("(a machine with 24GB free, 4 processes)")
    apart = replace(found, target=find_target("24GB"))
    assert apart.needed == apart.estimate.peak.total + apart.beside_tensors
    assert verdict(apart).endswith("(a GPU of 24GB, on each of 4)")


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ({"processes": 4, "strategy": "fsdp2"}, "fsdp2 over 4 holds a share on each"),
        ({"device_map": "auto"}, "device_map=auto spreads its layers"),
    ],
)
def test_what_no_device_holds_whole_gets_no_verdict(
    devices: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    content = {**config(folder), "devices": devices}
    file = write_config(tmp_path / "run.yaml", content)
    result = msplora("train", file, "--dry-run", "--device", "100MB")
    assert result.code == 0, result.err
    out = " ".join(result.out.split())
    assert f"with all of it on one device: 0.532 of 0.098 GiB (a GPU of 100MB); {said}" in out
    assert "fit" not in out.rpartition("•")[2]


def test_several_processes_are_not_measured(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--measure takes the steps in one process"):
        foreseen(folder, real=True, devices__processes=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dry-run", "--device", "H10O"], "Did you mean 'H100'"),
        (["--dry-run", "--device", "24 apples"], "is no device, no size"),
        (["--dry-run", "--device", "cuda:7"], "Name a size instead"),
        (["--dry-run", "--device", "24GB", "--measure"], "takes the steps here"),
    ],
)
def test_an_odd_device_is_refused(
    arguments: list[str], said: str, folder: Path, tmp_path: Path
) -> None:
    file = write_config(tmp_path / "run.yaml", config(folder))
    result = msplora("train", file, *arguments)
    assert result.code == 1
    assert said in result.error


@pytest.mark.parametrize("arguments", [["--measure"], ["--json"], ["--device", "cpu"]])
def test_options_of_a_dry_run_need_one(arguments: list[str], folder: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / "run.yaml", config(folder))
    assert msplora("train", file, *arguments).code == 2
    assert msplora("train", file, "--dry-run", "--resume").code == 2


def test_targets() -> None:
    assert find_target("24GB").capacity == find_target("24 gib").capacity == 24 * GIB
    assert 79 * GIB < find_target("NVIDIA H100").capacity < 80 * GIB
    assert find_target("RTX 4090").on_gpu
    assert not find_target("cpu:8GB").on_gpu
    assert find_target("cpu:8GB").overhead(1000, 200) == CPU_LIBRARIES + 800 * CPU_SLACK
    assert find_target("8GB").overhead(0, 0) > CUDA_CONTEXT
    with pytest.raises(ConfigError, match="cpu:16GB"):
        find_target("")


def test_a_checkpointed_run_can_be_foreseen_for_a_gpu(folder: Path) -> None:
    settings = make_settings(
        config(folder, SFT, dtype="bfloat16", training__gradient_checkpointing=True), "test"
    )
    assert dry_run(settings, "H100").fits


@pytest.mark.thorough
def test_a_model_of_7b_takes_no_memory(folder: Path, tmp_path: Path) -> None:
    decoder = json.loads((folder / "decoder/config.json").read_text())
    llama = {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 128, "num_hidden_layers": 32, "vocab_size": 32000,
        "max_position_embeddings": 4096, "dtype": "float16",
    }  # fmt: skip
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text(json.dumps(decoder | llama))
    for file in (folder / "decoder").glob("tokenizer*"):
        (tmp_path / "llama" / file.name).write_bytes(file.read_bytes())
    content = config(folder, SFT, model=str(tmp_path / "llama"), **ALL, training__batch_size=1)
    found = dry_run(make_settings(content, "test"), "24GB")
    assert found.trainable.adapter == 6_558_720  # as in the README
    assert found.estimate.training.parts[Held.FROZEN] == pytest.approx(2 * 6_738_415_616, rel=1e-3)
    assert found.estimate.training.parts[Held.OPTIMISER] >= 8 * 6_558_720
    assert found.fits
    assert 13 * GIB < found.needed < 14 * GIB


@pytest.mark.slow
def test_a_job_estimates_the_same_again(folder: Path) -> None:
    settings = make_settings(config(folder), "test")
    job = without_weights(settings)
    first = estimate(job, on_gpu=False)
    assert estimate(job, on_gpu=False) == first
    assert estimate(job, on_gpu=True).training.total != first.training.total
    assert not any(isinstance(its, FakeTensor) for its in job.adapted.model.parameters())
