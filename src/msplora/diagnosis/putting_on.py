"""The adapter put on its base, or why it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

_MOST_SAID = 600
"""Letters of PEFT's own errors, which list every tensor."""


class Misfit(Exception):
    """The adapter cannot be put on the base."""


def put_on(base: Any, folder: Path) -> PeftModel:
    """The adapter of a folder on a base.

    Raises:
        Misfit: it does not fit.
    """
    try:
        return PeftModel.from_pretrained(base, str(folder)).eval()
    except KeyError as error:  # PEFT looks for a head's tensors without asking
        raise Misfit(f"the file has no tensor {error}") from error
    except (RuntimeError, ValueError, AttributeError) as error:  # PEFT's, and our own
        raise Misfit(" ".join(str(error).split())[:_MOST_SAID]) from error
