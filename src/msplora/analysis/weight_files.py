"""Which files hold a model's weights: those that transformers would load, and no second copy."""

from __future__ import annotations

import json
from pathlib import Path

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The one file of a folder that is not in parts, or those that its index names.

    Raises:
        ValueError: the index is none.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    names = named_by_index(folder)
    if names:
        return [folder / name for name in names]
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))


def download_weights(source: str, revision: str | None) -> Path:
    """The folder into which a model of the hub is downloaded, with these files and no others.

    Many publish all weights a second time, as consolidated.safetensors or in folders.
    """
    import huggingface_hub

    def download(*names: str) -> Path:
        return Path(
            huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=list(names))
        )

    return download(*(named_by_index(download(INDEX)) or [WHOLE]))


def named_by_index(folder: Path) -> list[str]:
    """The names of the files that an index tells of; none where there is no index."""
    if not (folder / INDEX).is_file():
        return []
    content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    try:
        return sorted(set(content["weight_map"].values()))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{INDEX} has no weight_map") from error
