"""The forms that a plain LoRA is written in: PEFT's folder here, others in a file of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from .loading import CONFIG_FILE, WEIGHTS_FILE, write_json
from .serving import Form

WRAPPED = "base_model.model."
"""What PEFT puts before a module's path in a file's keys."""


@dataclass(frozen=True)
class PlainLora:
    """A LoRA as `plain_lora.lora_of` makes it."""

    tensors: dict[str, Tensor]
    """By the names PEFT saves."""
    config: dict[str, Any]
    """The content of adapter_config.json."""
    base_config: Any
    """The base model's transformers config."""

    @property
    def factor(self) -> float:
        """What B A is multiplied by."""
        return self.config["lora_alpha"] / self.config["r"]

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of each adapted linear layer, by its path: A (R, in), B (out, R)."""
        return {
            name.removeprefix(WRAPPED).removesuffix(_A): (
                tensor,
                self.tensors[name.removesuffix(_A) + _B],
            )
            for name, tensor in self.tensors.items()
            if name.endswith(_A)
        }


_A, _B = ".lora_A.weight", ".lora_B.weight"


def tensors_of(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The reverse of `PlainLora.pairs`."""
    tensors = {}
    for path, (a, b) in pairs.items():
        tensors |= {f"{WRAPPED}{path}{_A}": a, f"{WRAPPED}{path}{_B}": b}
    return tensors


class Written(Protocol):
    """One form of one LoRA. Making it raises what the form cannot hold; nothing is written yet."""

    weights_file: str

    def write(self, folder: Path) -> None:
        """Write the files into an empty folder."""
        ...

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The tensors that the files hold, by PEFT's names again."""
        ...


def in_form(form: Form, lora: PlainLora) -> Written:
    """The LoRA in a form.

    Raises:
        MSPLoraError: the form cannot hold it, or what writes the form is not installed.
    """
    if form == "gguf":
        from .to_gguf import AsGguf

        return AsGguf(lora)
    if form == "mlx":
        from .to_mlx import AsMlx

        return AsMlx(lora)
    return AsPeft(lora)


class AsPeft:
    """PEFT's folder, which vLLM, SGLang and most others read."""

    weights_file = WEIGHTS_FILE

    def __init__(self, lora: PlainLora) -> None:
        self._lora = lora

    def write(self, folder: Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json."""
        save_file(self._lora.tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(folder / CONFIG_FILE, self._lora.config)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The tensors of the file."""
        return load_file(folder / WEIGHTS_FILE)
