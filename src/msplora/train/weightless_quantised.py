"""A base that bitsandbytes would quantise, without its weights: what is left of each, scales."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AutoHfQuantizer

from msplora.errors import ConfigError
from msplora.extras import quantised_extra

from .quantisation import quantised_by


def quantise_without_weights(model: Any, quantisation: Any, arithmetic: torch.dtype) -> None:
    """Give a model on the meta device the layers that it would have, were it loaded quantised.

    bitsandbytes itself is not asked to quantise: it would keep code books without numbers.

    Args:
        model: unquantised, on the meta device.
        quantisation: how, as a checkpoint's config or `quantisation_config` says it.
        arithmetic: the dtype that the weights are loaded in before they are rounded.

    Raises:
        ConfigError: another library than bitsandbytes quantises.
        MSPLoraError: bitsandbytes is not installed.
    """
    kind = quantised_by(quantisation)
    if kind != "bitsandbytes":
        raise ConfigError(
            f"the weights of this base are quantised by {kind}, and a dry run knows only bases "
            f"that bitsandbytes quantises (quantization = 4bit or 8bit) or that are not quantised."
        )
    with quantised_extra():
        library = importlib.import_module("bitsandbytes")
    quantiser: Any = AutoHfQuantizer.from_config(quantisation, pre_quantized=False)
    quantiser.preprocess_model(model, device_map={"": "cpu"})
    with torch.device("meta"):
        for module in model.modules():
            if isinstance(module, library.nn.Linear4bit):
                module.weight = _in_4_bits(library, module, arithmetic)
            elif isinstance(module, library.nn.Linear8bitLt):
                module.weight = _in_8_bits(library, module)
                # Which columns of the inputs are outliers, and computed apart, only they can tell.
                module.state.threshold = 0.0
    quantiser.postprocess_model(model)
    model.hf_quantizer = quantiser


def scales(model: nn.Module) -> Iterator[Tensor]:
    """What quantised weights keep beside their numbers: scales of blocks or rows, code books."""
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from (its for its in vars(state).values() if isinstance(its, Tensor))
            state = state.state2
    for module in model.modules():
        # bitsandbytes moves the scales of 8 bits from the weight to the layer in its first forward.
        for place in (getattr(module, "weight", None), getattr(module, "state", None)):
            scale = getattr(place, "SCB", None)
            if isinstance(scale, Tensor):
                yield scale


def _in_4_bits(library: Any, module: Any, arithmetic: torch.dtype) -> nn.Parameter:
    weight = module.weight
    numbers = weight.numel()
    blocks = math.ceil(numbers / weight.blocksize)
    beside: dict[str, Any] = {"absmax": torch.empty(blocks)}
    if weight.compress_statistics:
        # The scales are themselves rounded, to 8 bits, in blocks of 256.
        nested = library.functional.QuantState(
            absmax=torch.empty(math.ceil(blocks / 256)),
            code=torch.empty(256),
            blocksize=256,
            dtype=torch.float32,
        )
        beside = {
            "absmax": torch.empty(blocks, dtype=torch.uint8),
            "offset": torch.empty(()),
            "state2": nested,
        }
    state = library.functional.QuantState(
        shape=weight.shape,
        dtype=arithmetic,
        blocksize=weight.blocksize,
        code=torch.empty(16),
        quant_type=weight.quant_type,
        **beside,
    )
    module.quant_state = state
    width = 2 * weight.quant_storage.itemsize
    return library.nn.Params4bit(
        torch.empty((math.ceil(numbers / width), 1), dtype=weight.quant_storage),
        requires_grad=False,
        quant_state=state,
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
        module=module,
        bnb_quantized=True,
    )


def _in_8_bits(library: Any, module: Any) -> nn.Parameter:
    rounded = torch.empty(module.weight.shape, dtype=torch.int8)
    return library.nn.Int8Params(
        rounded, requires_grad=False, CB=rounded, SCB=torch.empty(len(rounded))
    )
