"""Name the extra to install where a verb's libraries are missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from .errors import MSPLoraError

# Top-level modules that each extra brings, beyond what the core needs.
_MODULES = {
    "train": {
        "PIL",
        "accelerate",
        "datasets",
        "matplotlib",
        "pydantic",
        "scipy",
        "sklearn",
        "trl",
        "yaml",
    },
    "report": {"jinja2", "matplotlib"},
    "quantised": {"bitsandbytes"},
    "sweep": {"optuna"},
    "gguf": {"gguf", "requests", "tqdm", "yaml"},
    "harness": {"lm_eval"},
}


def how_to_install(extra: str) -> str:
    """How to get an extra: from a clone, since there is no release that an index could give."""
    return f"pip install -e '.[{extra}]' in msplora's clone"


@contextmanager
def _extra(name: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _MODULES[name]:
            raise
        raise MSPLoraError(
            f"this command needs {missing}, which is not installed: {how_to_install(name)}"
        ) from None


def train_extra() -> AbstractContextManager[None]:
    """Turn a failed import of the training libraries into an error that says what to install."""
    return _extra("train")


def quantised_extra() -> AbstractContextManager[None]:
    """The same for the library that quantises a base."""
    return _extra("quantised")


def report_extra() -> AbstractContextManager[None]:
    """The same for the libraries that plots and pages are made with."""
    return _extra("report")


def sweep_extra() -> AbstractContextManager[None]:
    """The same for the library that searches."""
    return _extra("sweep")


def gguf_extra() -> AbstractContextManager[None]:
    """The same for the library that writes llama.cpp's files."""
    return _extra("gguf")


def harness_extra() -> AbstractContextManager[None]:
    """The same for the tasks that language models are judged by."""
    return _extra("harness")
