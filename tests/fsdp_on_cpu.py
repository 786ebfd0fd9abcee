"""`msplora` in a process of `accelerate launch --use_fsdp` on the CPU.

accelerate shards on GPUs alone, and decides it by the kind of device it finds. Told that it found
some, it runs all of its FSDP2 on the CPU, over gloo; nothing else is changed.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from msplora.cli.app import main
from msplora.train.progress import ShowProgress

STOP_AT = "MSPLORA_TEST_STOP_AT"
"""The step at whose end one of the processes gets a SIGTERM."""


def _prepare_backend(*_: Any, **__: Any) -> tuple[str, DistributedType]:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU


def _set_device(self: Any) -> None:
    self.device = torch.device("cpu")


def stop_at(step: int) -> None:
    usual = ShowProgress.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        usual(self, args, state, control, **more)
        if state.global_step == step and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    ShowProgress.on_step_end = on_step_end  # pyright: ignore


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState._prepare_backend = _prepare_backend  # pyright: ignore
        PartialState.set_device = _set_device  # pyright: ignore
    if STOP_AT in os.environ:
        stop_at(int(os.environ[STOP_AT]))
    torch.set_num_threads(1)
    main()
