"""vLLM's engine on a CPU, the base's and the adapter's folder as they are.

In one process and without a tokenizer: ids go in, and the logits of every token come out, those of
the prompt as `prompt_logprobs` and those of its last token as what is generated from.
"""

from __future__ import annotations

import gc
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
from run import Asked, answer
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

RAN = "vLLM's engine for CPUs, the folder given as a LoRARequest"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@lru_cache(maxsize=1)
def engine(base: str, limit: int) -> LLM:
    return LLM(
        model=base,
        dtype="float32",
        enable_lora=True,
        max_lora_rank=limit,
        max_loras=1,
        max_model_len=64,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        logprobs_mode="raw_logits",
        max_logprobs=-1,
    )


current: list[tuple[str, int]] = []


def logits(asked: Asked, adapter: bool) -> torch.Tensor:
    rank = json.loads((Path(asked.adapter) / "adapter_config.json").read_text())["r"]
    which = asked.base, min(value for value in RANKS if value >= rank)
    if current != [which]:
        engine.cache_clear()
        gc.collect()
        if current:
            cleanup_dist_env_and_memory()
        current[:] = [which]
    wanted = SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=-1, logprobs=-1, detokenize=False
    )
    lora = LoRARequest(asked.adapter, abs(hash(asked.adapter)) % 2**31, asked.adapter)
    (done,) = engine(*which).generate(
        [{"prompt_token_ids": asked.ids}],
        wanted,
        lora_request=lora if adapter else None,
        use_tqdm=False,
    )
    # The first token is preceded by nothing; what follows the last is what was generated.
    rows: list[Any] = [*done.prompt_logprobs[1:], done.outputs[0].logprobs[0]]
    return torch.tensor([[row[number].logprob for number in range(len(row))] for row in rows])


if __name__ == "__main__":
    answer(logits, RAN, ["vllm-cpu", "torch", "transformers"])
