"""A plain LoRA as mlx-lm's adapter folder.

mlx-lm (tuner/lora.py) computes y + scale · (x a) b, with a (in, r) and b (r, out): the transposes
of PEFT's A and B, and a scale that is the factor itself, where PEFT divides alpha by the rank. It
loads strictly: a name or a shape that its model does not have is an error there.
"""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import UnsupportedError
from .forms import PlainLora, tensors_of
from .loading import CONFIG_FILE, write_json

MLX_FILE = "adapters.safetensors"

# mlx-lm calls the blocks of its models `model.layers`, whatever transformers calls them.
_IN_A_BLOCK = re.compile(r"model\.layers\.\d+\.(?P<key>.+)")


class AsMlx:
    """mlx-lm's folder: adapters.safetensors and an adapter_config.json of its own."""

    weights_file = MLX_FILE

    def __init__(self, lora: PlainLora) -> None:
        self._lora = lora
        self._keys = sorted({_key(path) for path in lora.pairs()})

    def write(self, folder: Path) -> None:
        """Write both files."""
        tensors = {}
        for path, (a, b) in self._lora.pairs().items():
            tensors[f"{path}.lora_a"] = a.T.contiguous()
            tensors[f"{path}.lora_b"] = b.T.contiguous()
        save_file(tensors, folder / MLX_FILE, metadata={"format": "mlx"})
        config = self._lora.config
        content = {
            "fine_tune_type": "lora",
            "num_layers": self._lora.base_config.num_hidden_layers,
            "lora_parameters": {
                "rank": config["r"],
                "scale": self._lora.factor,
                "dropout": 0.0,
                "keys": self._keys,
            },
        }
        if config["base_model_name_or_path"]:
            content["model"] = config["base_model_name_or_path"]
        write_json(folder / CONFIG_FILE, content)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The tensors of the file, transposed back."""
        tensors = load_file(folder / MLX_FILE)
        return tensors_of(
            {
                path: (
                    tensors[f"{path}.lora_a"].T.contiguous(),
                    tensors[f"{path}.lora_b"].T.contiguous(),
                )
                for path in self._lora.pairs()
            }
        )


def _key(path: str) -> str:
    """What mlx-lm selects a layer by: its path within the block, or its whole path outside."""
    found = _IN_A_BLOCK.fullmatch(path)
    if found is None and path != "lm_head":
        raise UnsupportedError(
            f"mlx-lm calls the blocks of its models model.layers, and this model's layers are "
            f"called {path!r}: it would not find them. Convert with --to merged."
        )
    if ".experts." in path:
        raise UnsupportedError(
            f"mlx-lm stores all experts of a layer in one tensor, and {path!r} is one expert's. "
            f"Convert with --to merged."
        )
    return found["key"] if found else path
