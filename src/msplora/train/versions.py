"""The versions a run was made with."""

from __future__ import annotations

import importlib.metadata
import platform

import msplora

_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers")


def versions() -> dict[str, str]:
    """Return name → version of what a number depends on."""
    found = {"msplora": msplora.__version__, "python": platform.python_version()}
    return found | {package: importlib.metadata.version(package) for package in _PACKAGES}
