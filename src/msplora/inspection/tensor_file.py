"""The tensors of safetensors files: what the headers say, and the numbers a block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msplora.errors import AdapterFileError

_BLOCK = 1 << 24
"""Numbers that are read at a time, about."""
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Header:
    """What is known of a tensor before it is read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """The first dimension; of a single number 1."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """All other dimensions."""
        return math.prod(self.shape[1:])


class TensorFiles:
    """All tensors of some files, none of which is held.

    Raises:
        AdapterFileError: a file is cut short or damaged.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = {file: file.stat().st_size for file in files}
        self._opened: dict[Path, Any] = {}
        self.headers: dict[str, Header] = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
                for name in opened.keys():  # noqa: SIM118
                    its = opened.get_slice(name)
                    stored = str(its.get_dtype())
                    dtype = _NAMES.get(stored, stored.lower())
                    self.headers[name] = Header(file, tuple(its.get_shape()), dtype)
            except (SafetensorError, OSError) as error:
                raise AdapterFileError(
                    f"{str(file)!r} ({file.stat().st_size:,} bytes) cannot be read: {error}. It is "
                    f"cut short or damaged; copy or download it again."
                ) from error
            self._opened[file] = opened

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._opened[self.headers[name].file].get_tensor(name)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """One tensor, some of its rows at a time, in float64; nothing of one of whole numbers."""
        header = self.headers[name]
        if not self.read_dtype(name).is_floating_point:
            return
        if not header.shape:
            yield self.read(name).double()
            return
        its = self._opened[header.file].get_slice(name)
        rows = max(1, _BLOCK * header.shape[0] // max(header.numbers, 1))
        for start in range(0, header.shape[0], rows):
            yield its[start : start + rows].double()

    def read_dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype as torch has it, without its numbers."""
        header = self.headers[name]
        if not header.shape:
            return self.read(name).dtype
        return self._opened[header.file].get_slice(name)[:0].dtype

    def is_finite(self, name: str) -> bool:
        """Whether a tensor holds neither a NaN nor an infinity."""
        return all(bool(block.isfinite().all()) for block in self.blocks(name))

    def dtypes(self) -> dict[str, int]:
        """How many numbers there are of each dtype."""
        found: dict[str, int] = {}
        for header in self.headers.values():
            found[header.dtype] = found.get(header.dtype, 0) + header.numbers
        return found
