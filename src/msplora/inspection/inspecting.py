"""`msplora.inspect`: from a path to what is there, for which base, and what is suspicious."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msplora import __version__
from msplora.analysis.history import checkpoint_folders, step_of
from msplora.config_file import lora_or_pyramid, read_json
from msplora.errors import UNFINISHED, AdapterFileError, UnsupportedError, stopped_run
from msplora.folder_mark import CONVERSION
from msplora.loading import CONFIG_FILE, WEIGHTS_FILE, adapter_folder
from msplora.serving import GGUF_FILE

from .adapter import look_at_adapter
from .model import look_at_model, weight_files
from .results import Inspection
from .tensor_file import TensorFiles

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many of its steps are done, and of how many."""

_RUN = "metrics.json"


def inspect(path: str | Path, *, progress: Progress | None = None) -> Inspection:
    """Say what a folder holds: an adapter, a run, a plain LoRA, or a whole model.

    Files are read one pair, or a part of one tensor, at a time; no model is loaded and no network
    is asked.

    Args:
        path: the folder of an MSPLoRA adapter, of PEFT's plain LoRA, of a run or of a model; one
            that has checkpoints only stands for its last.
        progress: called as the work goes on.

    Returns:
        Frozen values; `to_dict()` and `to_json()` give them away.

    Raises:
        MSPLoraError: there is nothing that can be read, or it is an adapter of another method.
    """
    given = Path(path).expanduser()
    place = _find(given)
    report = progress or (lambda what, done, total: None)

    def done(steps: int, total: int) -> None:
        report(f"reading {place.folder.name}", steps, total)

    if place.is_model:
        return _model(path, place, done)
    config = lora_or_pyramid(place.folder, "inspected")
    files = TensorFiles([_adapter_file(place.folder)])
    found = look_at_adapter(files, config, done)
    is_pyramid = str(getattr(config.peft_type, "value", config.peft_type)) == "MSPLORA"
    task = getattr(config.task_type, "value", config.task_type)
    return Inspection(
        path=str(path),
        weights=str(place.folder),
        what="MSPLoRA" if is_pyramid else "LoRA",
        found_as=place.found_as,
        base=config.base_model_name_or_path or None,
        model_type=getattr(config, "model_type", None),
        task=None if task is None else str(task),
        files=_sizes(files),
        dtypes=files.dtypes(),
        parameters=found.parameters,
        other_parameters=found.other_parameters,
        levels=found.levels,
        kinds=found.kinds,
        pairs=found.pairs,
        findings=found.findings,
        version=__version__,
    )


def _model(path: str | Path, place: _Place, done: Callable[[int, int], None]) -> Inspection:
    config = read_json(place.folder / "config.json")
    files = TensorFiles(weight_files(place.folder))
    findings = look_at_model(files, place.folder, done)
    dtypes = files.dtypes()
    return Inspection(
        path=str(path),
        weights=str(place.folder),
        what="model",
        found_as=place.found_as,
        base=None,
        model_type=config.get("model_type"),
        task=next(iter(config.get("architectures") or []), None),
        files=_sizes(files),
        dtypes=dtypes,
        parameters=sum(dtypes.values()),
        other_parameters=0,
        levels=(),
        kinds=(),
        pairs=(),
        findings=tuple(findings),
        version=__version__,
    )


@dataclass(frozen=True)
class _Place:
    """Where the tensors are."""

    folder: Path
    found_as: str
    is_model: bool = False


def _find(path: Path) -> _Place:
    if not path.exists():
        adapter_folder(path)  # says so, and what is near
    if path.is_file():
        raise AdapterFileError(f"{str(path)!r} is a file; give the folder that it is in.")
    whole = path.resolve()  # "." has no name
    run = "unfinished run" if whole.name.endswith(UNFINISHED) else "run"
    if (path / CONFIG_FILE).is_file():
        return _Place(path, _converted(path) or "adapter")
    if (path / "adapter" / CONFIG_FILE).is_file():
        return _Place(path / "adapter", run)
    if (path / "config.json").is_file():
        return _Place(path, _converted(path) or "model", is_model=True)
    if (path / "model" / "config.json").is_file() and (path / _RUN).is_file():
        return _Place(path / "model", run, is_model=True)
    for config in (CONFIG_FILE, "config.json"):
        checkpoints = checkpoint_folders(path, config)
        if checkpoints:
            found_as = f"{run}'s checkpoint of step {step_of(checkpoints[-1])}"
            return _Place(checkpoints[-1], found_as, is_model=config != CONFIG_FILE)
    if (path / GGUF_FILE).is_file():
        raise UnsupportedError(
            f"{str(path)!r} holds a LoRA for llama.cpp ({GGUF_FILE}), which is not read here. "
            f"Inspect what it was converted from."
        )
    found = ", ".join(sorted(os.listdir(path))[:8]) or "nothing"
    raise AdapterFileError(
        f"{str(path)!r} is neither an adapter nor a run nor a model: it has no {CONFIG_FILE} and "
        f"no config.json (found: {found}).{stopped_run(whole)}"
    )


def _converted(folder: Path) -> str | None:
    """What the folder was converted from, where msplora converted it."""
    if not (folder / CONVERSION).is_file():
        return None
    return f"converted from {read_json(folder / CONVERSION).get('from', 'an adapter')}"


def _adapter_file(folder: Path) -> Path:
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise AdapterFileError(
            f"{str(folder)!r} has no {WEIGHTS_FILE}. An adapter saved as a pickle (.bin) is not "
            f"read; save it again with safe_serialization=True."
        )
    return file


def _sizes(files: TensorFiles) -> dict[str, int]:
    return {file.name: size for file, size in files.files.items()}
