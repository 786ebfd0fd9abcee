"""The tensors of an adapter's file, of which one is held at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from msplora.loading import WEIGHTS_FILE, check_finite, open_tensors


class TensorsOnDisk(Mapping[str, Tensor]):
    """Name → tensor, read whenever it is asked for and not kept.

    The file is mapped anew each time, and the mapping goes with the tensor: what has been read once
    does not stay in the process's memory.

    Raises:
        AdapterFileError: there is no file, it is cut short, or it holds values that are not finite.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / WEIGHTS_FILE
        self.shapes: dict[str, Tensor] = {}
        """Name → a tensor of that shape without numbers, on the meta device."""
        self._stored: dict[str, str] = {}
        """Name → what the file calls it."""
        with open_tensors(folder) as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                shape = opened.get_slice(name).get_shape()
                self.shapes[name] = torch.empty(shape, device="meta")
                self._stored[name] = name
        check_finite(self, str(self.path))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        with open_tensors(self.path.parent) as opened:
            return opened.get_tensor(self._stored[name])

    def renamed(self, names: Mapping[str, str]) -> TensorsOnDisk:
        """The same tensors by other names.

        Args:
            names: a new name → the one that it has here.
        """
        found = copy(self)
        found.shapes = {new: self.shapes[old] for new, old in names.items()}
        found._stored = {new: self._stored[old] for new, old in names.items()}
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
