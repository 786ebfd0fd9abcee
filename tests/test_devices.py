"""Several processes train what one trains, and save and resume all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from fsdp_on_cpu import STOP_AT
from msplora.errors import ConfigError
from msplora.train import devices
from msplora.train.devices import PRESETS, launch_arguments
from msplora.train.run import train_run
from msplora.train.settings import DeviceSettings
from msplora.train.settings_file import make_settings
from runs import config_on, save_bases, write_config
from runs import msplora as command

SCRIPT = Path(__file__).with_name("fsdp_on_cpu.py")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Without dropout, whose masks are drawn by each process for itself.
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return save_bases(tmp_path_factory.mktemp("bases"), 44, **none)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def config(bases: Path, task: str, output: str, processes: int, **training: Any) -> Path:
    """Two epochs over 40 rows in steps of 8, whatever the number of processes."""
    usual = {"epochs": 2, "batch_size": 8 // processes}
    content = config_on(bases, task, output=output, training=usual | training)
    return write_config(Path(f"{output}.yaml"), content)


def in_processes(
    strategy: str, *arguments: object, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `msplora ARGUMENTS` in two processes, as `--processes 2` does, but for the script."""
    told = launch_arguments(DeviceSettings(processes=2), [str(its) for its in arguments])
    place = told.index("--module")
    told[place : place + 2] = [str(SCRIPT)]
    told = [*PRESETS[strategy], *(its for its in told if its not in PRESETS["ddp"])]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *told],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=os.environ | (environment or {}),
    )


def losses(run: str) -> list[float]:
    history = json.loads(Path(run, "log_history.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry]


def adapter(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run, "adapter", "adapter_model.safetensors"))


def assert_alike(one: str, several: str) -> None:
    """The same losses at every step, the same evaluations, and the same adapter, whole."""
    assert losses(several) == pytest.approx(losses(one), rel=1e-4)
    first, second = (json.loads(Path(run, "metrics.json").read_text()) for run in (one, several))
    for before, after in zip(
        [first["before"], *first["evaluations"]],
        [second["before"], *second["evaluations"]],
        strict=True,
    ):
        assert after["step"] == before["step"]
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-4)
    expected, found = adapter(one), adapter(several)
    assert {name: its.shape for name, its in found.items()} == {
        name: its.shape for name, its in expected.items()
    }
    for name, tensor in found.items():
        assert bool(tensor.isfinite().all())
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    file = "adapter/adapter_model.safetensors"
    assert Path(several, file).stat().st_size == Path(one, file).stat().st_size


@pytest.mark.parametrize(
    "task",
    [
        pytest.param("sft", marks=pytest.mark.slow),
        pytest.param("classification", marks=pytest.mark.thorough),
    ],
)
def test_two_processes_train_what_one_trains(bases: Path, task: str) -> None:
    assert command("train", config(bases, task, "one", 1)).code == 0
    done = subprocess.run(
        [sys.executable, "-m", "msplora", "train", config(bases, task, "two", 2), "--processes=2"],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("The run is in") == 1  # one of them prints
    assert "Warning" not in done.stderr
    assert_alike("one", "two")
    reloaded = command("eval", "two", "--json")
    best = json.loads(Path("two/metrics.json").read_text())["best"]
    assert reloaded.json()["loss"] == pytest.approx(best["loss"], rel=1e-5)


# By hand, for it may crash where nobody can help it: FSDP2 on a CPU exchanges tensors by gloo, in
# which one process of many runs ended with a segmentation fault. test_distributed.py is CI's.
@pytest.mark.thorough
def test_a_sharded_model_trains_saves_and_resumes(bases: Path) -> None:
    """FSDP2, every block and the rest sharded, with gradient checkpointing."""
    options = {"gradient_checkpointing": True, "save_steps": 3}
    assert command("train", config(bases, "sft", "one", 1, **options)).code == 0
    two = config(bases, "sft", "two", 2, **options)
    stopped = in_processes("fsdp2", "train", two, environment={STOP_AT: "4"})
    assert stopped.returncode != 0
    assert "of step 4" in " ".join(stopped.stderr.split())
    assert not Path("two").exists()
    alone = command("train", two, "--resume")
    assert "2 processes, and this run has 1" in alone.error
    resumed = in_processes("fsdp2", "train", two, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "goes on after step 4" in resumed.stdout
    assert_alike("one", "two")
    reloaded = command("eval", "two", "--json")
    best = json.loads(Path("two/metrics.json").read_text())["best"]
    assert reloaded.json()["loss"] == pytest.approx(best["loss"], rel=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_deepspeed_trains_saves_and_resumes(bases: Path, strategy: str) -> None:
    pytest.importorskip("deepspeed", reason="a large extra with compiled parts: by hand")
    options = {"save_steps": 3}
    assert command("train", config(bases, "sft", "one", 1, **options)).code == 0
    two = config(bases, "sft", "two", 2, **options)
    on_cpu = {"DS_ACCELERATOR": "cpu"}
    stopped = in_processes(strategy, "train", two, environment={**on_cpu, STOP_AT: "4"})
    assert stopped.returncode != 0
    assert "of step 4" in " ".join(stopped.stderr.split())
    resumed = in_processes(strategy, "train", two, "--resume", environment=on_cpu)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "goes on after step 4" in resumed.stdout
    assert_alike("one", "two")


@pytest.mark.thorough
def test_stages_under_ddp(bases: Path) -> None:
    options = {"stages": ["global", ["mid", "local"]]}
    assert command("train", config(bases, "sft", "one", 1, **options)).code == 0
    done = in_processes("ddp", "train", config(bases, "sft", "two", 2, **options))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_alike("one", "two")


@pytest.mark.thorough
def test_a_mistake_is_told_once_without_a_traceback(bases: Path) -> None:
    file = config(bases, "sft", "two", 2, stages=["top"])
    done = subprocess.run(
        [sys.executable, "-m", "msplora", "train", file, "--processes", "2"],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 1
    assert done.stderr.count("Error:") == 1
    assert "training.stages names the level 'top'" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not list(Path().glob("two*/"))


def test_gradients_are_those_of_one_large_batch(bases: Path) -> None:
    """A classifier's loss is a mean over rows, in several batches as in one."""
    assert command("train", config(bases, "classification", "one", 1)).code == 0
    halves = config(bases, "classification", "halves", 2, gradient_accumulation=2)
    assert command("train", halves).code == 0
    assert_alike("one", "halves")


def test_a_base_placed_by_a_device_map_trains_alike(bases: Path) -> None:
    """With one device, all of it is there; what it says of the placement is accelerate's."""
    assert command("train", config(bases, "sft", "one", 1)).code == 0
    mapped = command("train", config(bases, "sft", "map", 1), "--set=devices.device_map=auto")
    assert mapped.code == 0, mapped.err
    assert_alike("one", "map")


def test_a_base_placed_by_a_device_map_stays_where_it_is(
    bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config(bases, "sft", "map", 1)
    assert command("train", file, "--set=devices.device_map=auto").code == 0
    moved: list[Any] = []
    monkeypatch.setattr(peft.PeftModel, "to", lambda *its: moved.append(its), raising=False)
    assert command("eval", "map").code == 0
    assert not moved


@pytest.mark.thorough
def test_a_run_that_lacks_only_its_name_gets_it_from_one_process(bases: Path) -> None:
    arguments = [config(bases, "sft", "two", 2), "--processes=2"]
    for flags in ([], ["--resume"], ["--resume=auto"]):
        done = subprocess.run(
            [sys.executable, "-m", "msplora", "train", *arguments, *flags],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if not flags:
            Path("two").rename("two.unfinished")
    assert Path("two/run.json").is_file()
    assert not Path("two.unfinished").exists()


def test_other_than_the_processes_that_are_asked_for_are_refused(bases: Path, here: Path) -> None:
    settings = make_settings(config_on(bases, devices={"processes": 2}), "a test")
    with pytest.raises(ConfigError, match=r"devices\.processes = 2, and 1 train here"):
        train_run(settings)
    assert not list(here.iterdir())


@pytest.mark.parametrize("method", ["adalora", "elalora"])
def test_a_launcher_of_ones_own_does_not_start_several_of_what_takes_one(
    bases: Path, here: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `torchrun --nproc-per-node 2` starts them, where the settings ask for nothing."""
    settings = make_settings(config_on(bases, method=method), "a test")
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("msplora.train.run.join", lambda: pytest.fail("it went on"))
    with pytest.raises(ConfigError, match=f"'{method}' trains in one process.*and 2 train here"):
        train_run(settings)
    assert not list(here.iterdir())
    with pytest.raises(pytest.fail.Exception, match="it went on"):
        train_run(make_settings(config_on(bases), "a test"))


def test_a_number_of_processes_that_no_launcher_set_is_refused(
    bases: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a cluster's job exports it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2 is set without RANK and MASTER_ADDR:"):
        train_run(make_settings(config_on(bases), "a test"))
    assert not list(here.iterdir())


@pytest.mark.parametrize("strategy", PRESETS)
def test_accelerate_knows_every_preset(strategy: str) -> None:
    from accelerate.commands.launch import launch_command_parser

    asked = DeviceSettings(processes=3, strategy=strategy)  # pyright: ignore
    told = launch_command_parser().parse_args(launch_arguments(asked, ["train", "a.yaml"]))
    assert (told.num_processes, told.training_script) == (3, "msplora")
    assert told.module
    assert told.training_script_args == ["train", "a.yaml"]
    assert told.use_fsdp is (strategy == "fsdp2")
    assert told.use_deepspeed is strategy.startswith("zero")


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"processes": 2, "strategy": "fsdp2"}, "this machine has none"),
        ({"processes": 2, "strategy": "fdsp"}, "Did you mean 'fsdp2'?"),
        ({"processes": 0}, "greater than or equal to 1"),
        ({"processes": 2, "device_map": "auto"}, "Choose one"),
    ],
)
def test_what_no_machine_can_do_is_refused(
    bases: Path, asked: dict[str, Any], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = config(bases, "sft", "run", 1)
    changes = [f"--set=devices.{key}={value}" for key, value in asked.items()]
    found = command("train", file, *changes)
    assert found.code == 1
    assert error in found.error
    assert not Path("run.unfinished").exists()


def test_too_few_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="processes = 3, but this machine has 2 GPUs"):
        devices.check_devices(DeviceSettings(processes=3))
    devices.check_devices(DeviceSettings(processes=2))


def test_deepspeed_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install deepspeed"):
        devices.check_devices(DeviceSettings(processes=2, strategy="zero3"))


@pytest.mark.parametrize("task", ["sft", "classification"])
def test_of_several_gpus_a_process_takes_one(
    bases: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers finds them where nothing says which: it would train on all by itself."""
    made = transformers.TrainingArguments.__post_init__

    def on_four(self: Any) -> None:
        made(self)
        self._n_gpu = 4

    assert command("train", config(bases, task, "one", 1)).code == 0
    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", on_four)
    found = command("train", config(bases, task, "of_four", 1))
    assert found.code == 0, found.err
    assert_alike("one", "of_four")
