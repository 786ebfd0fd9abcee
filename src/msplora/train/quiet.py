"""Keep the libraries underneath from printing what a user can do nothing about."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import transformers


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Errors only from transformers and TRL, and no bars of theirs; as before afterwards.

    With `msplora -v` nothing is silenced. Deprecations of options that exist under both names in
    the versions we support are for us to follow, not for users to read.
    """
    if logging.getLogger("msplora").getEffectiveLevel() <= logging.DEBUG:
        yield
        return
    bars = datasets.are_progress_bars_disabled(), transformers.logging.is_progress_bar_enabled()
    verbosity = transformers.logging.get_verbosity()
    others = [logging.getLogger(name) for name in ("trl", "accelerate", "datasets", "bitsandbytes")]
    levels = [logger.level for logger in others]
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    for logger in others:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message=".*pin_memory.*", category=UserWarning)
            yield
    finally:
        for logger, level in zip(others, levels, strict=True):
            logger.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        if bars[1]:
            transformers.logging.enable_progress_bar()
        if not bars[0]:
            datasets.enable_progress_bars()
