"""Several processes that get a signal save and end as one would, and the command ends with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from msplora.train import devices
from msplora.train.checkpoints import read
from msplora.train.settings import DeviceSettings
from msplora.train.stopping import Interrupted
from runs import config_on, save_bases, write_config

STAND_IN = """
import os, signal, sys, time

def leave(number, _):
    heard.append(number)

heard, wanted = [], WANTED
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, leave)
open(f"ready-{os.environ['RANK']}", "w").close()
while len(heard) < wanted:
    time.sleep(0.01)
time.sleep(1.5)  # what is under way
open(f"saved-{os.environ['RANK']}", "w").close()
sys.exit(EXIT or 128 + heard[-1])
"""
"""In the place of msplora: works on for longer than the launcher is told to wait, and saves."""

SLOW_EVALUATION = """
import os, time

if "RANK" in os.environ:
    from msplora.train.held_out_trainer import JudgesHeldOutRows

    usual = JudgesHeldOutRows.evaluate

    def evaluate(self, *arguments, **more):
        if self.state.global_step:
            open(f"evaluates-{os.environ['RANK']}", "w").close()
            time.sleep(4)
        return usual(self, *arguments, **more)

    JudgesHeldOutRows.evaluate = evaluate
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # Where torch knows it: what is under way takes longer, and is waited for all the same.
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    kept = {its: signal.getsignal(its) for its in (signal.SIGHUP, signal.SIGQUIT)}
    yield tmp_path
    for number, before in kept.items():  # which torch's launcher leaves changed
        signal.signal(number, before)


def both(name: str) -> Callable[[], bool]:
    return lambda: all(Path(f"{name}-{rank}").exists() for rank in (0, 1))


def wait_until(seen: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not seen() and time.monotonic() < end:
        time.sleep(0.02)


def launch(monkeypatch: pytest.MonkeyPatch, *signals: int, wanted: int = 1, ends: int = 0) -> int:
    """`devices.launch` of two stand-ins, with signals to this process once both are ready."""
    script = Path("stand_in.py").absolute()
    script.write_text(STAND_IN.replace("WANTED", str(wanted)).replace("EXIT", str(ends)))
    told = devices.launch_arguments(DeviceSettings(processes=2), [])
    place = told.index("--module")
    told[place : place + 2] = [str(script)]
    monkeypatch.setattr(devices, "launch_arguments", lambda *_: told)

    def send() -> None:
        wait_until(both("ready"), 60)
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return devices.launch(DeviceSettings(processes=2), [])
    finally:
        sender.join()


def test_the_processes_are_told_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert launch(monkeypatch, signal.SIGTERM) == 143
    assert both("saved")()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_second_ctrl_c_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch(monkeypatch, signal.SIGTERM, signal.SIGINT, wanted=2) == 130
    assert both("saved")()


def test_a_third_ctrl_c_kills_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted, match=r"Stopped by Ctrl-C, before .* --resume auto") as stopped:
        launch(monkeypatch, *[signal.SIGINT] * 3, wanted=9)
    assert stopped.value.exit_code == 130
    assert not list(Path().glob("saved-*"))


def test_a_hangup_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted, match="Stopped by SIGHUP") as stopped:
        launch(monkeypatch, signal.SIGHUP)
    assert stopped.value.exit_code == 129


def test_what_ignores_the_hangup_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As nohup asks for."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert launch(monkeypatch, signal.SIGHUP, signal.SIGTERM) == 143
    assert both("saved")()


@pytest.mark.slow
def test_an_evaluation_under_way_is_finished_and_saved(tmp_path: Path) -> None:
    """By the command itself, and a Ctrl-C as a terminal sends it: to the group."""
    bases = save_bases(tmp_path / "bases", 24)
    training = {"epochs": 2, "batch_size": 4}
    file = write_config(
        tmp_path / "config.yaml", config_on(bases, "sft", output="run", training=training)
    )
    Path("slow").mkdir()
    Path("slow/sitecustomize.py").write_text(SLOW_EVALUATION)
    paths = os.pathsep.join(filter(None, [str(Path("slow").absolute()), os.getenv("PYTHONPATH")]))
    with Path("said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "msplora", "train", file, "--processes=2"],
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=os.environ | {"PYTHONPATH": paths},
            start_new_session=True,
        )
        wait_until(lambda: both("evaluates")() or process.poll() is not None, 200)
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(60)
    error = " ".join(Path("said").read_text().split())
    assert code == 130, error
    assert error.count("stopping after this evaluation") == 1
    assert error.count("To go on: msplora train") == 1
    assert "Traceback" not in error
    checkpoint = read(Path("run.unfinished/checkpoints/checkpoint-3"))
    assert checkpoint.processes == 2
