"""Inputs that a model can be compared on, and what it answers to them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .errors import UnsupportedError
from .verifying import Comparison, compared

_BY_HAND = "Convert with --no-verify and compare the two on your own data."
_SIDE = 224
"""Pixels of an image where neither model nor processor says how many: what most were made for."""

# What a model raises of inputs that are not for it.
_NOT_FOR_IT = (
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)


def probe_inputs(model: Any, advice: str) -> dict[str, Tensor]:
    """Inputs a model can be compared on: random tokens or pixels, from a fixed seed.

    Args:
        model: the adapted one, or a plain one.
        advice: what to do where there are none, for the message.

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
        end = text.eos_token_id
        if alone and config.is_encoder_decoder and isinstance(end, int):
            # It reads its answer off the end of the text, of which each row has to have one.
            ids[ids == end] = (end + 1) % text.vocab_size
            ids[:, -1] = end
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
        return inputs
    if name == "pixel_values":
        shape = (2, getattr(config, "num_channels", 3), *_image_size(config))
        return {name: torch.rand(shape, generator=generator).to(device, base.dtype)}
    raise UnsupportedError(
        f"{type(base).__name__} takes {name!r}, for which there are no test inputs. {advice}"
    )


def _image_size(config: Any) -> tuple[int, int]:
    """Height and width: the model's, its processor's, or the usual ones where it takes any."""
    size = getattr(config, "image_size", None)
    if size is None:
        size = _size_of_processor(Path(getattr(config, "name_or_path", "") or ""))
    if isinstance(size, dict):
        side = size.get("shortest_edge", size.get("longest_edge", _SIDE))
        return int(size.get("height", side)), int(size.get("width", side))
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _size_of_processor(base: Path) -> Any:
    try:
        content = json.loads((base / "preprocessor_config.json").read_text(encoding="utf-8"))
        return content.get("crop_size") or content.get("size") or _SIDE
    except (OSError, ValueError, AttributeError):
        return _SIDE


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's logits in float32, or its last hidden state where it has no head."""
    with torch.inference_mode():
        output = model(**inputs)
    found = output.get("logits", output.get("last_hidden_state"))
    if found is None:
        found = next(value for value in output.values() if isinstance(value, Tensor))
    return found.float().cpu()


@contextmanager
def inputs_it_takes(model: Any, inputs: Mapping[str, Tensor], advice: str) -> Iterator[None]:
    """Turn a model's own error into one that says that it does not run on these inputs.

    Raises:
        UnsupportedError: it does not.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _NOT_FOR_IT as error:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        shapes = ", ".join(f"{name} {tuple(its.shape)}" for name, its in inputs.items())
        raise UnsupportedError(
            f"{type(base).__name__} does not run on the test inputs {shapes}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}. {advice}"
        ) from error


class Probe:
    """The logits of a model with and without its adapter, taken before it is converted."""

    def __init__(self, model: PeftModel, inputs: dict[str, Tensor] | None = None) -> None:
        self.inputs = probe_inputs(model, _BY_HAND) if inputs is None else inputs
        with inputs_it_takes(model, self.inputs, _BY_HAND):
            with model.disable_adapter():
                self.base = logits(model, self.inputs)
            self.adapted = logits(model, self.inputs)
        base: Any = model.get_base_model()
        self.dtype: torch.dtype = base.dtype

    def compared(self, converted: nn.Module, *dtypes: torch.dtype) -> Comparison:
        """Compare the answers of what was converted, whose numbers went through `dtypes` too."""
        found = logits(converted, self.inputs)
        return replace(
            compared(self.base, self.adapted, found, {self.dtype, *dtypes}),
            dtype=str(self.dtype).removeprefix("torch."),
        )
