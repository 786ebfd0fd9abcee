"""llama.cpp itself, through llama-cpp-python: base and adapter as GGUF files."""

from __future__ import annotations

import llama_cpp
import numpy as np
from run import Asked, answer

RAN = "llama.cpp's forward pass, base and adapter as GGUF, keys and values in float32"
F32 = 0  # GGML_TYPE_F32


def logits(asked: Asked, adapter: bool) -> np.ndarray:
    model = llama_cpp.Llama(
        asked.base,
        lora_path=asked.adapter if adapter else None,
        n_ctx=64,
        n_threads=1,
        logits_all=True,
        type_k=F32,
        type_v=F32,
        verbose=False,
    )
    model.eval(asked.ids)
    return np.array(model.scores[: len(asked.ids)])


if __name__ == "__main__":
    answer(logits, RAN, ["llama-cpp-python"])
