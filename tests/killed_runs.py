"""Runs in processes of their own, which can be killed: forked from one that has imported torch."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from runs import answered_rows, labelled_rows, save_decoder, save_encoder, write_jsonl

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["msplora.train.sft", "msplora.train.classification"])


def save_bases(folder: Path) -> Path:
    """The models and the data of `config`."""
    save_encoder(folder / "encoder", positions=16)
    save_decoder(folder / "decoder", attention_dropout=0.1)
    write_jsonl(folder / "labelled.jsonl", labelled_rows(40))
    write_jsonl(folder / "answered.jsonl", answered_rows(40))
    return folder


def config(bases: Path, task: str, output: Path, **training: Any) -> dict[str, Any]:
    """Two epochs of five steps; the loss curve has an entry every three."""
    classifies = task == "classification"
    usual = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "logging_steps": 3}
    return {
        "model": str(bases / ("encoder" if classifies else "decoder")),
        "task": task,
        "output": str(output),
        "adapter": {"lora_dropout": 0.1},
        "training": usual | training,
        "data": {"train": str(bases / ("labelled.jsonl" if classifies else "answered.jsonl"))},
    }


def start(content: dict[str, Any], before: Callable[[], None] | None = None) -> BaseProcess:
    """Begin `msplora train --resume auto`; `before` is called first, in the other process."""
    process = _PROCESSES.Process(target=_train, args=(content, before))
    process.start()
    return process


def run_to_its_end(content: dict[str, Any], before: Callable[[], None] | None = None) -> int | None:
    """Run, and return the exit code."""
    process = start(content, before)
    process.join(120)
    return process.exitcode


def kill_when(process: BaseProcess, seen: Callable[[], bool]) -> bool:
    """Kill as soon as something is seen; False where the process ended before."""
    while not seen():
        if not process.is_alive():
            return False
        time.sleep(0.0005)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def after(seconds: float) -> Callable[[], bool]:
    """Whether so much time has gone by since now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def what_was_found(run: Path) -> dict[str, Any]:
    """All numbers of a run's result, but for the times that things took."""
    weights = next(iter(sorted(run.glob("*/*.safetensors"))))
    return {
        "weights": weights.read_bytes(),
        "metrics": (run / "metrics.json").read_text(),
        "log": [
            {key: value for key, value in entry.items() if not _is_a_time(key)}
            for entry in json.loads((run / "log_history.json").read_text())
        ],
    }


def _is_a_time(key: str) -> bool:
    return key.endswith(("_runtime", "_per_second", "_preparation_time"))


def _train(content: dict[str, Any], before: Callable[[], None] | None) -> None:
    import sys

    import torch
    from rich.console import Console

    from msplora.errors import MSPLoraError
    from msplora.train.run import train_run
    from msplora.train.settings_file import make_settings

    torch.set_num_threads(1)
    if before:
        before()
    log = Path(content["output"] + ".log")
    with log.open("a", encoding="utf-8") as said:
        try:
            train_run(make_settings(content, "a test"), "auto", console=Console(file=said))
        except MSPLoraError as error:
            said.write(f"{error}\n")
            sys.exit(error.exit_code)
