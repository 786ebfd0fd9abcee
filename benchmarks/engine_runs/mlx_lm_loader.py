"""mlx-lm's own loader and model, on MLX's CPU backend."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from run import Asked, answer

RAN = "mlx-lm's load_model and load_adapters, and its forward pass on the CPU"


def logits(asked: Asked, adapter: bool) -> np.ndarray:
    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(asked.base))
    if adapter:
        model = load_adapters(model, asked.adapter)
    model.eval()
    return np.array(model(mx.array([asked.ids]))[0].astype(mx.float32))


if __name__ == "__main__":
    answer(logits, RAN, ["mlx-lm", "mlx"])
