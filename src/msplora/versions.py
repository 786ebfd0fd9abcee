"""The versions a run, or a measurement, was made with."""

from __future__ import annotations

import importlib.metadata
import platform

from . import __version__

_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers")


def versions() -> dict[str, str]:
    """Return name → version of what a number depends on; what is not installed is left out."""
    found = {"msplora": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
