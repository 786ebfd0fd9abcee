"""A plain LoRA as llama.cpp's GGUF file.

llama.cpp (src/llama-adapter.cpp) wants `general.type` "adapter", `adapter.type` "lora", the base's
architecture, and for a tensor NAME of the base NAME.lora_a (R, in) and NAME.lora_b (out, R); its
factor is `adapter.lora.alpha` over the rank of the tensor. The base's file was made by its
`convert_hf_to_gguf.py`, so an update has to go through what that does to the weight: other names,
and in Llama's family the rows of q and k in the order of its own rotary embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedError
from .extras import gguf_extra
from .forms import PlainLora, tensors_of
from .serving import GGUF_FILE


@dataclass(frozen=True)
class _Layout:
    """How llama.cpp stores the layers of a model type."""

    architecture: str
    """Its name in `gguf.MODEL_ARCH`."""
    rotated: bool = False
    """Whether the rows of q and k are put in another order."""


# Types whose linear layers are stored one to one, compared tensor by tensor with what llama.cpp's
# own converter makes of the same LoRA (`make engines`).
_LAYOUTS = {
    "gemma": _Layout("GEMMA"),
    "gemma2": _Layout("GEMMA2"),
    "gemma3_text": _Layout("GEMMA3"),
    "granite": _Layout("GRANITE", rotated=True),
    "llama": _Layout("LLAMA", rotated=True),
    "mistral": _Layout("LLAMA", rotated=True),
    "olmo2": _Layout("OLMO2"),
    "phi3": _Layout("PHI3"),
    "qwen2": _Layout("QWEN2"),
    "qwen3": _Layout("QWEN3"),
    "smollm3": _Layout("SMOLLM3", rotated=True),
    "starcoder2": _Layout("STARCODER2"),
}
MODEL_TYPES = tuple(_LAYOUTS)


class AsGguf:
    """llama.cpp's file: adapter.gguf."""

    weights_file = GGUF_FILE

    def __init__(self, lora: PlainLora) -> None:
        self._lora = lora
        self._layout = _layout(lora.base_config)
        self._names = _names(self._layout, lora)

    def write(self, folder: Path) -> None:
        """Write the file."""
        with gguf_extra():
            import gguf
        config = self._lora.config
        writer = gguf.GGUFWriter(folder / GGUF_FILE, _arch_name(self._layout))
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
        for path, (a, b) in self._lora.pairs().items():
            heads = self._heads(path)
            stored = b if heads is None else rotary_order(b, heads)
            for suffix, tensor in (("lora_a", a), ("lora_b", stored)):
                kind = _QUANTIZATION[tensor.dtype]
                data = gguf.quantize(
                    tensor.float().contiguous().numpy(), gguf.GGMLQuantizationType[kind]
                )
                writer.add_tensor(
                    f"{self._names[path]}.{suffix}",
                    data,
                    raw_dtype=gguf.GGMLQuantizationType[kind],
                )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The tensors of the file, in PEFT's order again."""
        with gguf_extra():
            import gguf
        found = {
            tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            for tensor in gguf.GGUFReader(folder / GGUF_FILE).tensors
        }
        pairs = {}
        for path, name in self._names.items():
            b, heads = found[f"{name}.lora_b"], self._heads(path)
            pairs[path] = (
                found[f"{name}.lora_a"],
                b if heads is None else rotary_order(b, heads, back=True),
            )
        return tensors_of(pairs)

    def _heads(self, path: str) -> int | None:
        """How many heads a layer has whose rows are put in another order."""
        config: Any = self._lora.base_config
        kind = path.rpartition(".")[2]
        if not self._layout.rotated or kind not in ("q_proj", "k_proj"):
            return None
        if kind == "q_proj" or config.num_key_value_heads is None:
            return config.num_attention_heads
        return config.num_key_value_heads


_QUANTIZATION = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def rotary_order(b: Tensor, heads: int, *, back: bool = False) -> Tensor:
    """The rows of q's or k's B (out, R) in llama.cpp's order, or back.

    transformers rotates feature i of a head with feature i + d / 2, llama.cpp's Llama feature 2 i
    with 2 i + 1 (`LlamaModel.permute` in its conversion/llama.py).
    """
    half = b.shape[0] // heads // 2
    shape = (heads, half, 2, -1) if back else (heads, 2, half, -1)
    return b.reshape(shape).swapaxes(1, 2).reshape(b.shape)


def _layout(config: Any) -> _Layout:
    try:
        return _LAYOUTS[config.model_type]
    except KeyError:
        raise UnsupportedError(
            f"how llama.cpp stores the layers of {config.model_type!r} is not known here, only of "
            f"{', '.join(MODEL_TYPES)}. Convert with --to lora, and that with llama.cpp's own "
            f"convert_lora_to_gguf.py."
        ) from None


def _arch_name(layout: _Layout) -> str:
    with gguf_extra():
        import gguf
    return gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[layout.architecture]]


def _names(layout: _Layout, lora: PlainLora) -> dict[str, str]:
    """Path of an adapted layer -> the name of its weight in the base's GGUF."""
    with gguf_extra():
        import gguf
    known = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[layout.architecture], lora.base_config.num_hidden_layers
    )
    names = {}
    for path in lora.pairs():
        name = known.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if name is None:
            raise UnsupportedError(
                f"llama.cpp has no tensor for {path!r} in the architecture "
                f"{_arch_name(layout)!r}. Leave it out of target_modules, or convert with --to "
                f"merged."
            )
        names[path] = name
    return names
