"""From an adapter's folder to the adapted model: find the folder, check the file, load the base."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from . import sisters
from .base_class import base_class
from .classifier_head import CLASSIFIERS, label_options
from .damaged_files import said_of_damaged
from .errors import (
    AdapterFileError,
    BaseModelError,
    ConfigError,
    MSPLoraError,
    nearest_path,
    stopped_run,
)
from .finite import is_finite
from .planning import without_storage
from .random_weights import warn_of_random
from .same_source import same_source

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MODEL = "the model"
TASK_FILE = "task.json"
"""What `msplora train` leaves beside an adapter: its settings, and the classes of its data."""

DTYPES = ("float32", "bfloat16", "float16")
"""Those that adapters are written in, and bases loaded."""
_COPY = re.compile(r"\.(?:modules_to_save(?:\.default)?|original_module)(?=\.(?:weight|bias)$)")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class BaseOptions:
    """How to load a base model."""

    source: str | None = None
    """A path or hub id, where not the one the adapter names."""
    dtype: str = "auto"
    """ "auto" (as stored), "float32", "bfloat16" or "float16"."""
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype != "auto":
            dtype_named(self.dtype)

    @classmethod
    def of(cls, base: str | Path | BaseOptions | None) -> BaseOptions:
        """The options where a path, a hub id or nothing may stand for them."""
        if isinstance(base, BaseOptions):
            return base
        return cls(None if base is None else str(base))

    def revision_for(self, config: Any) -> str | None:
        """Of the base: as asked, or as an adapter's config says of the base that it names."""
        named = config.base_model_name_or_path
        if self.revision or (self.source and not (named and same_source(named, self.source))):
            return self.revision
        return getattr(config, "revision", None)

    def recorded_for(self, config: Any) -> tuple[str | None, str | None]:
        """What a conversion of an adapter says of its base: the name, and the revision."""
        name = resolve_source(self.source) if self.source else config.base_model_name_or_path
        return name, self.revision_for(config)


def dtype_named(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ConfigError: there is none, or nothing is written in it.
    """
    if name not in DTYPES:
        raise ConfigError(f"no dtype {name!r}; there are {', '.join(DTYPES)}.")
    return getattr(torch, name)


def adapter_folder(path: Path) -> Path:
    """The folder that holds the adapter: `path` itself, or `path/adapter` of a run.

    Raises:
        AdapterFileError: neither is one.
    """
    path = path.expanduser()
    for folder in (path, path / "adapter"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if not path.exists():
        raise AdapterFileError(f"there is no folder {str(path)!r}.{nearest_path(path)}")
    found = ", ".join(sorted(os.listdir(path))[:8]) if path.is_dir() else "it is a file"
    raise AdapterFileError(
        f"{str(path)!r} is no adapter: it has no {CONFIG_FILE} (found: {found or 'nothing'})."
        f"{_last_checkpoint(path) or stopped_run(path)}"
    )


def _last_checkpoint(path: Path) -> str:
    """What to give in place of a run that has no more than checkpoints yet."""
    steps = {
        int(step): config.parent
        for where in (path, path / "checkpoints")
        for config in where.glob(f"checkpoint-*/{CONFIG_FILE}")
        if (step := config.parent.name.rpartition("-")[2]).isdecimal() and _is_whole(config.parent)
    }
    return f" Its last checkpoint is one: {str(steps[max(steps)])!r}." if steps else ""


def _is_whole(folder: Path) -> bool:
    """Whether an adapter's tensors can be read: one that was being saved may be cut short."""
    with contextlib.suppress(AdapterFileError), open_tensors(folder):
        return True
    return False


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file, on the CPU.

    Raises:
        AdapterFileError: there is no file, it is cut short, or it holds values that are not finite.
    """
    with open_tensors(folder) as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    check_finite(tensors, str(folder / WEIGHTS_FILE))
    return tensors


def is_copy(name: str, names: Container[str]) -> bool:
    """Whether a tensor without a place in the model is in the file under another name, too.

    Of embeddings that were given more tokens and trained whole PEFT writes what its wrapper holds
    beside what it loads.
    """
    own = _COPY.sub("", name)
    return own != name and own in names


@contextmanager
def open_tensors(folder: Path) -> Iterator[safe_open]:
    """The file of an adapter's tensors, mapped into memory.

    Raises:
        AdapterFileError: there is no file, or it is cut short.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise AdapterFileError(
            f"{str(folder)!r} has no {WEIGHTS_FILE}. An adapter saved as a pickle (.bin) is not "
            f"read; save it again with safe_serialization=True."
        )
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"{str(file)!r} ({file.stat().st_size:,} bytes) cannot be read: {error}. It is cut "
            f"short or damaged; copy or download it again."
        ) from error


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `AdapterFileError` if any of `tensors` holds a NaN or an infinity."""
    bad = [key for key, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise AdapterFileError(
            f"{where}: {len(bad)} tensor(s) hold values that are not finite, such as {bad[0]}. The "
            f"training diverged, or the dtype is too small; train again with a lower learning rate."
        )


def read_config(folder: Path) -> PeftConfig:
    """The adapter's PEFT config."""
    sisters.register()  # so that PEFT knows their types, as it does ours
    try:
        return PeftConfig.from_pretrained(str(folder))
    except MSPLoraError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterFileError(
            f"{str(folder / CONFIG_FILE)!r} cannot be read: {type(error).__name__}: {error}"
        ) from error


def base_named_by(folder: Path) -> str | None:
    """The base that an adapter's config names, whatever wrote it.

    Raises:
        AdapterFileError: the config is no JSON object, or its base is no name.
    """
    file = folder / CONFIG_FILE
    try:
        named = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except KeyError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise AdapterFileError(f"{str(file)!r} cannot be read: {error}") from error
    if named is not None and not isinstance(named, str):
        raise AdapterFileError(
            f"{str(file)!r} has base_model_name_or_path = {named!r}; it has to be a path or a hub "
            f"id, in quotes."
        )
    return named


def class_names(folder: Path) -> list[str]:
    """The classes that an adapter was trained to tell apart, where they are known."""
    try:
        content = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
        return [str(label) for label in (content["classes"] or {"labels": []})["labels"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # not from `msplora train`; its classes have no names then


def load_base_of(
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    base: BaseOptions,
    classes: Sequence[str] = (),
) -> nn.Module:
    """Load the base model of an adapter with the class it was adapted with."""
    source = base.source or config.base_model_name_or_path
    if not source:
        raise BaseModelError("the adapter does not name its base model; pass it with --base.")
    source = resolve_source(source)
    options: dict[str, Any] = {
        "revision": base.revision_for(config),
        "trust_remote_code": base.trust_remote_code,
        dtype_argument(): base.dtype if base.dtype == "auto" else dtype_named(base.dtype),
    }
    with loading_errors_explained(source):
        loader = base_class(config, source, base)
    brought = {key.removeprefix("base_model.model.") for key in tensors}
    if loader.__module__.partition(".")[0] == "transformers":
        options["output_loading_info"] = True
    if not loader.__name__.endswith(CLASSIFIERS):
        with loading_errors_explained(source), quiet_loading():
            loaded = loader.from_pretrained(source, **options)
        model, info = loaded if isinstance(loaded, tuple) else (loaded, {"missing_keys": ()})
        warn_of_random(source, set(info["missing_keys"]) - brought, model)
        return model
    # A base may have the head of other classes, or none; the adapter's takes its place.
    options |= label_options(config, tensors, classes)
    with loading_errors_explained(source), quiet_loading():
        model, info = loader.from_pretrained(
            source, **options | {"output_loading_info": True}, ignore_mismatched_sizes=True
        )
    unlike = sorted(set(mismatched_names(info)) - brought)
    random = sorted(set(info["missing_keys"]) - brought)
    if unlike or (random and loader.__name__.endswith("ForImageClassification")):
        raise BaseModelError(
            f"{source}: weights that the adapter does not bring are missing or have another shape: "
            f"{', '.join((unlike + random)[:5])}."
        )
    warn_of_random(source, random, model)
    return model


def without_weights(config: PeftConfig, of_base: Any, source: str, base: BaseOptions) -> nn.Module:
    """The base that an adapter's config is for, on the meta device: shapes without storage.

    Args:
        config: the adapter's.
        of_base: the base's own, as transformers reads it.
        source: the base's folder or hub id.
        base: how it is loaded.

    Raises:
        BaseModelError: such a base cannot be built of its config.
    """
    with loading_errors_explained(source):
        found = base_class(config, source, base)
    try:
        return without_storage(found, of_base, base.trust_remote_code)
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"the base {source!r} is a {of_base.model_type}, and cannot be built as the "
            f"{found.__name__} that was adapted ({type(error).__name__}: {error}). Pass the "
            f"model that the adapter was made for."
        ) from error


def resolve_source(name: str, what: str = "model") -> str:
    """Return a hub id as it is and a folder as its absolute path; refuse a path to nothing.

    Raises:
        BaseModelError: `name` looks like a path, and there is no such folder.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.exists():
        raise BaseModelError(f"{what} {name!r} is a file; give the folder that holds config.json.")
    first = Path(path.parts[0]) if path.parts else path
    looks_like_path = (
        name.startswith((".", "~", os.sep))
        or not _HUB_ID.fullmatch(name)
        or (len(path.parts) > 1 and first.is_dir())
    )
    if looks_like_path:
        hint = nearest_path(path) or (
            " Give a folder with config.json, or a hub id such as org/name."
        )
        raise BaseModelError(f"{what} {name!r}: there is no such folder.{hint}")
    return name


def dtype_argument() -> str:
    """What `from_pretrained` calls its dtype: renamed in transformers 4.56."""
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    return "dtype" if version >= (4, 56) else "torch_dtype"


def mismatched_names(info: Mapping[str, Any]) -> list[str]:
    """The weights that had another shape in the files, of what transformers says of a loading.

    The last releases of transformers 4 give names alone, the others both shapes with each.
    """
    return [its if isinstance(its, str) else its[0] for its in info["mismatched_keys"]]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' loading bar and report."""
    logging = transformers.utils.logging
    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def loading_errors_explained(source: str, what: str = MODEL) -> Iterator[None]:
    """Turn a loader's error into one line that says what was asked and what to do."""
    folder = Path(source)
    try:
        if what == MODEL and folder.is_dir() and not (folder / "config.json").is_file():
            # transformers 4 takes the folder's name for an architecture's ("empty" is an MPT).
            raise OSError("no config.json")
        yield
    except MSPLoraError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, SafetensorError):
            advice = said_of_damaged(folder)
        elif "trust_remote_code" in reason:
            advice = "It brings its own Python code: opt in with trust_remote_code if you trust it."
        elif (folder / CONFIG_FILE).exists() or (folder / "adapter" / CONFIG_FILE).exists():
            advice = (
                "The folder is an adapter: name its base as the model (and in a run's config, the "
                "folder as init_from)."
            )
        elif folder.is_dir():
            advice = f"The folder holds: {', '.join(sorted(os.listdir(folder))[:8]) or 'nothing'}."
        else:
            advice = (
                "It is neither a folder here nor to be had from the hub. Check the name, the "
                "network and, for a gated model, `hf auth login`."
            )
        raise BaseModelError(
            f"cannot load {what} {source!r}: {advice} ({type(error).__name__}: {reason[:300]})"
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as readable JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
