"""A whole model's files, a part of one tensor at a time: merged, whole, finite and in scale?"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

from msplora.analysis.weight_files import INDEX, WHOLE, named_by_index
from msplora.analysis.weight_files import weight_files as files_to_read
from msplora.errors import AdapterFileError
from msplora.matching import STORE_NAME

from .results import Finding
from .suspicions import FEWEST, OUTLIER, not_finite, some
from .tensor_file import TensorFiles

_OF_AN_ADAPTER = re.compile(rf"\.lora_|\.base_layer\.|{STORE_NAME}|msplora_")
_PART = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")
_AGAIN = "Copy or download it again."


def weight_files(folder: Path) -> list[Path]:
    """The files of a whole model's weights: those that transformers reads, as far as they exist.

    Raises:
        AdapterFileError: it has none in safetensors, or its index is none.
    """
    try:
        files = [file for file in files_to_read(folder) if file.is_file()]
    except ValueError as error:
        raise AdapterFileError(
            f"{str(folder / INDEX)!r} cannot be read ({type(error).__name__}: {error}). {_AGAIN}"
        ) from error
    if not files:
        raise AdapterFileError(
            f"{str(folder)!r} is a model without weights in safetensors. One saved as a pickle "
            f"(.bin) is not read; save it again with safe_serialization=True."
        )
    return files


def look_at_model(
    files: TensorFiles, folder: Path, done: Callable[[int, int], None]
) -> list[Finding]:
    """Find what is suspicious about a model's weights."""
    norms: dict[str, float] = {}
    infinite: list[str] = []
    for place, name in enumerate(files.headers, start=1):
        square = sum(float(block.square().sum()) for block in files.blocks(name))
        # The square of a finite number may overflow; then the numbers themselves are looked at.
        if math.isfinite(square):
            norms[name] = math.sqrt(square)
        elif not files.is_finite(name):
            infinite.append(name)
        done(place, len(files.headers))
    matrices = {
        name: norm
        for name, norm in norms.items()
        if len(files.headers[name].shape) > 1
        and files.read_dtype(name).is_floating_point
        and not _OF_AN_ADAPTER.search(name)
    }
    return [
        *_missing(files, folder),
        *_left_over(files, folder),
        *_unmerged(files),
        *not_finite(infinite),
        *_zero(matrices),
        *_exploded(files, matrices),
    ]


def _missing(files: TensorFiles, folder: Path) -> list[Finding]:
    there = {file.name for file in files.files}
    if WHOLE in there:
        return []
    index = folder / INDEX
    if not index.is_file():
        return _without_index(sorted(there))
    named: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    lost = sorted(set(named.values()) - there)
    tensors = [name for name, file in named.items() if file in there and name not in files.headers]
    if not lost and not tensors:
        return []
    what = f"file(s): {some(lost)}" if lost else f"tensor(s): {some(tensors)}"
    text = f"{INDEX} names {len(lost) or len(tensors)} missing {what}. {_AGAIN}"
    return [Finding("missing tensor", "problem", text, tuple(lost or tensors))]


def _left_over(files: TensorFiles, folder: Path) -> list[Finding]:
    """What another saving into the same folder has left, in more or fewer parts."""
    there = {file.name for file in files.files}
    parts = [its.name for its in folder.iterdir() if _PART.fullmatch(its.name)]
    index = [INDEX] if WHOLE in there and _has_other_files(folder) else []
    others = index + sorted(set(parts) - there)
    if not others:
        return []
    text = (
        f"Two models were saved here: transformers reads {some(sorted(there))}. Of the other one "
        f"there is left, and some servers go by it: {some(others)}. Delete what is not meant."
    )
    return [Finding("other weights", "warning", text, tuple(others))]


def _has_other_files(folder: Path) -> bool:
    """Whether an index tells of files beside the whole model's, of which some write one too."""
    try:
        return not set(named_by_index(folder)) <= {WHOLE}
    except ValueError:
        return True


def _without_index(names: list[str]) -> list[Finding]:
    """Of a model in parts nothing is loaded without the file that says what is in which."""
    parts = [found for name in names if (found := _PART.fullmatch(name))]
    if not parts:
        return []
    last = parts[0][1]
    whole = [f"model-{part:05}-of-{last}.safetensors" for part in range(1, int(last) + 1)]
    lost = [INDEX, *sorted(set(whole) - set(names))]
    text = f"A model in {int(last)} parts lacks {some(lost)}: it cannot be loaded. {_AGAIN}"
    return [Finding("missing tensor", "problem", text, tuple(lost))]


def _unmerged(files: TensorFiles) -> list[Finding]:
    found = [name for name in files.headers if _OF_AN_ADAPTER.search(name)]
    if not found:
        return []
    text = (
        f"{len(found)} tensor(s) are an adapter's, or of layers that carry one: {some(found)}. It "
        f"was saved without merging: use merge_and_unload(), or msplora convert --to merged."
    )
    return [Finding("unmerged", "problem", text, tuple(found))]


def _zero(matrices: dict[str, float]) -> list[Finding]:
    found = [name for name, norm in matrices.items() if norm == 0]
    if not found:
        return []
    text = f"{len(found)} matrix(es) hold zeros only: {some(found)}. Was it saved half loaded?"
    return [Finding("zero weight", "warning", text, tuple(found))]


def _exploded(files: TensorFiles, matrices: dict[str, float]) -> list[Finding]:
    alike: dict[tuple[str, tuple[int, ...]], dict[str, float]] = defaultdict(dict)
    for name, norm in matrices.items():
        alike[re.sub(r"\d+", "#", name), files.headers[name].shape][name] = norm
    found = []
    for its in alike.values():
        middle = median(its.values())
        if len(its) >= FEWEST:
            found += [name for name, norm in its.items() if norm > OUTLIER * middle > 0]
    if not found:
        return []
    text = (
        f"The norm of {len(found)} matrix(es) is above {OUTLIER:g} times the median of the same "
        f"place in other blocks: {some(found)}. If an adapter was merged, look at its norms."
    )
    return [Finding("exploded weight", "warning", text, tuple(found))]
