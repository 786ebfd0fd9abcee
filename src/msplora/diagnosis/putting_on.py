"""The adapter put on its base, or why it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from msplora.adapted import fit_vocabulary
from msplora.errors import TensorsError
from msplora.loading import open_tensors

_MOST_SAID = 600
"""Letters of PEFT's own errors, which list every tensor."""


class Misfit(Exception):
    """The adapter cannot be put on the base.

    Attributes:
        of_tensors: what is wrong are single tensors of a pyramid. Where its config knows the
            fingerprint of its sites, the base has been found to have them before.
    """

    def __init__(self, said: str, of_tensors: bool = False) -> None:
        super().__init__(said)
        self.of_tensors = of_tensors


def put_on(base: Any, folder: Path) -> PeftModel:
    """The adapter of a folder on a base, which is given as many embeddings as the adapter brings.

    Raises:
        Misfit: it does not fit.
    """
    with open_tensors(folder) as opened:
        shapes = {
            name: torch.empty(opened.get_slice(name).get_shape(), device="meta")
            for name in opened.keys()  # noqa: SIM118  (it is no mapping)
        }
    fit_vocabulary(base, shapes)
    try:
        return PeftModel.from_pretrained(base, str(folder)).eval()
    except KeyError as error:  # PEFT looks for a head's tensors without asking
        raise Misfit(f"the file has no tensor {error}") from error
    except IndexError as error:  # of trainable_token_indices
        raise Misfit(f"it trains tokens that the base does not have: {error}") from error
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # PEFT's, and our own
        said = " ".join(str(error).split())[:_MOST_SAID]
        raise Misfit(said, isinstance(error, TensorsError)) from error
