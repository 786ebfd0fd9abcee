"""Proving a conversion on the real model: the same inputs through both, compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MSPLoraError, UnsupportedError

# By the coarsest dtype on the way; relative to the largest logit where that is above 1.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class VerificationError(MSPLoraError):
    """A converted model does not answer as the adapted one does."""


@dataclass(frozen=True)
class Comparison:
    """How far a converted model's logits are from the adapted model's."""

    difference: float
    """The largest absolute difference."""
    effect: float
    """The largest absolute change of the logits by the adapter itself, for scale."""
    tolerance: float

    def __str__(self) -> str:
        return (
            f"largest difference in logits {self.difference:.2e} (allowed {self.tolerance:.0e}; "
            f"the adapter moves them by up to {self.effect:.2e})"
        )


def probe_inputs(model: Any) -> dict[str, Tensor]:
    """Inputs a model can be compared on: random tokens or pixels, from a fixed seed.

    Raises:
        UnsupportedError: the model takes neither.
    """
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = getattr(base, "main_input_name", "input_ids")
    config: Any = base.config
    if name == "input_ids":
        text = config.get_text_config()
        length = min(16, getattr(text, "max_position_embeddings", None) or 16)
        # A classifier that reads its answer off the last token tells rows apart by their padding.
        alone = type(base).__name__.endswith("ForSequenceClassification")
        rows = 1 if alone and text.pad_token_id is None else 2
        ids = torch.randint(text.vocab_size, (rows, length), generator=generator).to(device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
        return inputs
    if name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        shape = (2, config.num_channels, height, width)
        return {name: torch.rand(shape, generator=generator).to(device, base.dtype)}
    raise UnsupportedError(
        f"{type(base).__name__} takes {name!r}, for which there are no test inputs. Convert with "
        f"--no-verify and compare the two on your own data."
    )


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's logits in float32, or its last hidden state where it has no head."""
    with torch.inference_mode():
        output = model(**inputs)
    found = output.get("logits", output.get("last_hidden_state"))
    if found is None:
        found = next(value for value in output.values() if isinstance(value, Tensor))
    return found.float().cpu()


def compare(
    base: Tensor, adapted: Tensor, converted: Tensor, dtypes: set[torch.dtype]
) -> Comparison:
    """Compare logits, and raise if they are further apart than rounding explains.

    Args:
        base: logits without the adapter.
        adapted: logits with it.
        converted: logits of what was converted from it.
        dtypes: the dtypes the numbers went through.

    Raises:
        VerificationError: they differ too much, or are not finite.
    """
    if not bool(torch.isfinite(adapted).all()) or not bool(torch.isfinite(converted).all()):
        raise VerificationError(
            "the logits are not finite, so the conversion cannot be checked; nothing was written. "
            "Try --dtype float32."
        )
    scale = max(1.0, float(adapted.abs().max()))
    comparison = Comparison(
        difference=float((converted - adapted).abs().max()),
        effect=float((adapted - base).abs().max()),
        tolerance=scale * max(_TOLERANCE.get(dtype, 1e-1) for dtype in dtypes),
    )
    if comparison.difference > comparison.tolerance:
        raise VerificationError(
            f"the converted model does not answer as the adapted one: {comparison}. Nothing was "
            f"written. Please report this, with the adapter's config."
        )
    return comparison
