"""The command that serves a plain LoRA."""

from __future__ import annotations

import shlex

# The values that vLLM accepts for --max-lora-rank.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def serve_command(model: str, adapter: str, rank: int, name: str) -> str:
    """Return vLLM's command for a LoRA of `rank`; merged weights are what is left beyond 512."""
    fitting = [allowed for allowed in _VLLM_RANKS if allowed >= rank]
    if not fitting:
        return f"(rank {rank} is beyond vLLM's {_VLLM_RANKS[-1]}: serve the merged model)"
    return (
        f"vllm serve {shlex.quote(model)} --enable-lora --max-lora-rank {fitting[0]} "
        f"--lora-modules {shlex.quote(name)}={shlex.quote(adapter)}"
    )
