"""The servers: what each reads, what it cannot represent, and the command that starts it.

What they lack was read in their source (vLLM 0.33.0, SGLang 0.5.23, llama.cpp of llama-cpp-python
0.3.36, mlx-lm 0.32.2); `make engines` runs their code on converted adapters.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Form = Literal["lora", "gguf", "mlx"]
"""How an adapter is written: PEFT's folder, llama.cpp's file, or mlx-lm's folder."""

GGUF_FILE = "adapter.gguf"

# What a plain LoRA may hold (`server_limits.features`) -> why nearly no server takes it.
_RARE = {
    "encoder and decoder": "it serves no such language models",
    "no language model": "it serves language models",
    "DoRA": "it knows no DoRA",
    "biases": "it reads no trained biases",
    "saved modules": "it reads no whole modules from an adapter",
    "trained tokens": "it reads no rows of the embedding from an adapter",
    "convolution": "it adapts no convolutions",
    "attention module": "it adapts no nn.MultiheadAttention",
    "outside the language model": "it skips what lies outside the language model",
}
_HEAD = {"classifier's head": "it reads no classifier's head from an adapter"}
_ONLY_LINEAR = {
    **_RARE,
    **_HEAD,
    "experts": "it stores experts in another form",
    "Conv1D": "it stores the layer transposed, which would swap A and B",
}


@dataclass(frozen=True)
class Server:
    """What serves a LoRA, and what it does not."""

    title: str
    form: Form
    """What it reads."""
    lacks: Mapping[str, str]
    """A feature of adapters -> why it cannot be served."""
    default_rank: int | None = None
    """The largest rank it takes unless its flag says otherwise."""
    ranks: tuple[int, ...] | None = None
    """The values its flag takes; `None`: any."""
    flag: str | None = None
    """The flag that sets its largest rank."""

    def flag_for(self, rank: int) -> str | None:
        """The flag with the least value that lets `rank` in; `None` where none does or is needed.

        Where the server finds out by itself what the loaded adapters need, no flag is needed.
        """
        if self.flag is None or self.default_rank is None:
            return None
        fitting = [value for value in self.ranks or (rank,) if value >= rank]
        return f"{self.flag} {fitting[0]}" if fitting else None


SERVERS = {
    "vllm": Server(
        "vLLM",
        "lora",
        {
            **_RARE,
            "experts": "of most models it reads experts in another form, and skips these",
            "Conv1D": "its models with Conv1D layers, GPT-2 among them, take no LoRA",
        },
        default_rank=16,
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        flag="--max-lora-rank",
    ),
    "sglang": Server("SGLang", "lora", _ONLY_LINEAR, flag="--max-lora-rank"),
    "llama.cpp": Server(
        "llama.cpp",
        "gguf",
        {
            **_ONLY_LINEAR,
            "embedding": "an embedding's update is not written as GGUF here",
        },
    ),
    "mlx": Server(
        "mlx-lm",
        "mlx",
        {
            **_ONLY_LINEAR,
            "Conv1D": "its names for such a model's layers are others",
            "embedding": "an embedding's update is not written in mlx-lm's form here",
        },
    ),
}
WRITTEN_FOR = {server.form: name for name, server in SERVERS.items() if server.form != "lora"}
"""The forms that one server alone reads -> that server."""


def serve_command(
    model: str,
    adapter: str,
    rank: int,
    name: str,
    server: str | None = None,
    max_lora_rank: int | None = None,
) -> str:
    """Return the command that serves a converted adapter.

    Args:
        model: the base, as its user named it.
        adapter: the folder of the converted adapter.
        rank: the adapter's.
        name: what requests call the adapter.
        server: one of `SERVERS`; vLLM if left out. Beyond vLLM's 512 merged weights are left.
        max_lora_rank: the largest rank that the server is started for, where that was said.
    """
    base, folder = shlex.quote(model), shlex.quote(adapter)
    if server == "llama.cpp":
        file = shlex.quote(str(Path(adapter) / GGUF_FILE))
        return f"llama-server --model BASE.gguf --lora {file}"
    if server == "mlx":
        return f"mlx_lm.server --model {base} --adapter-path {folder}"
    named = f"{shlex.quote(name)}={folder}"
    if server == "sglang":
        limit = f" --max-lora-rank {max_lora_rank}" if max_lora_rank else ""
        return f"python -m sglang.launch_server --model-path {base} --lora-paths {named}{limit}"
    flag = SERVERS["vllm"].flag_for(max_lora_rank or rank)
    if flag is None:
        return f"(rank {rank} is beyond vLLM's {_largest('vllm')}: serve the merged model)"
    return f"vllm serve {base} --enable-lora {flag} --lora-modules {named}"


def _largest(server: str) -> int:
    return max(SERVERS[server].ranks or (0,))
