"""Which of a model's weight files cannot be read, and what to do about it."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

_POINTER = b"version https://git-lfs"


def said_of_damaged(folder: Path) -> str:
    """Name the first safetensors file of a folder that cannot be read, and say what to do.

    The error of safetensors names no file, and one of many is at fault.
    """
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            is_pointer = opened.read(len(_POINTER)) == _POINTER
        if is_pointer:
            return (
                f"{file.name} is a git-lfs pointer, not the weights. Fetch them with `git lfs "
                f"pull`, or download the model again."
            )
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return (
                f"{file.name} ({file.stat().st_size:,} bytes) is cut short or damaged. Copy or "
                f"download it again."
            )
    return "A file of its weights is cut short or damaged. Copy or download it again."
