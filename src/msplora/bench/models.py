"""A shape's model with random weights, its head, and a step's input."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .points import Point
from .shapes import Shape


def classifier_class(shape: Shape) -> Any:
    """The transformers class of a shape."""
    import transformers

    return {
        "roberta": transformers.RobertaForSequenceClassification,
        "llama": transformers.LlamaForSequenceClassification,
    }[shape.family]


def build_base(point: Point, device: str = "cpu") -> Any:
    """The model with everything frozen but its head, made where it is needed, in its own dtype.

    Its parameters are made on the meta device first: a model of 7B parameters in bfloat16 never
    exists in float32, nor in the machine's memory if it is for a GPU.
    """
    from accelerate import init_empty_weights

    shape = point.its_shape
    dtype = getattr(torch, point.precision.base)
    config = shape.config(point.layers)
    config.dtype = dtype
    # Buffers stay real: they hold numbers (rotary frequencies) that no initialiser would give back.
    with init_empty_weights(include_buffers=False):
        model = classifier_class(shape)._from_config(config, attn_implementation="sdpa")
    torch.manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                filled = _filled(module, name, parameter, dtype, device)
                module._parameters[name] = nn.Parameter(filled, requires_grad=False)
    model.to(device=device)  # the buffers
    head_of(model).requires_grad_(True)
    return model


def _filled(module: nn.Module, name: str, like: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """Random numbers of the usual size for matrices; norms start as the identity."""
    filled = torch.empty(like.shape, dtype=dtype, device=device)
    if filled.dim() > 1:
        return filled.uniform_(-0.035, 0.035)  # a deviation of 0.02, in half a normal's time
    is_norm = name == "weight" and "Norm" in type(module).__name__
    return filled.fill_(1.0 if is_norm else 0.0)


def head_of(model: Any) -> nn.Module:
    """What every method trains."""
    return model.score if hasattr(model, "score") else model.classifier


def shared_copy(base: Any) -> Any:
    """A model of its own whose frozen parameters and buffers are those of `base`, not copies."""
    kept = [parameter for parameter in base.parameters() if not parameter.requires_grad]
    return copy.deepcopy(base, {id(its): its for its in [*kept, *base.buffers()]})


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def batch_of(point: Point, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids without padding, and classes: the same at every call."""
    generator = torch.Generator().manual_seed(1)
    size = (point.batch, point.length)
    ids = torch.randint(2, point.its_shape.vocabulary, size, generator=generator)
    labels = torch.randint(0, 2, (point.batch,), generator=generator)
    return ids.to(device), labels.to(device)


def loss_of(model: Any, embedded: Tensor, labels: Tensor) -> Tensor:
    """From embedded tokens to the loss: what is compiled where a point says so.

    It begins after the embedding, because the graph that torch compiles cannot contain the hook of
    `enable_input_require_grads`, and would drop the gradient of what is not one of its inputs.
    Without padding, a Llama's class is read at its last token.
    """
    hidden = getattr(model, model.base_model_prefix)(inputs_embeds=embedded).last_hidden_state
    head = head_of(model)
    logits = head(hidden[:, -1] if isinstance(head, nn.Linear) else hidden)
    return F.cross_entropy(logits.float(), labels)


def compiled_loss(name: str, backend: str = "inductor") -> Callable[[Any, Tensor, Tensor], Tensor]:
    """`loss_of`, compiled whole, for one model.

    Each model gets a code object of its own. Torch keeps what it compiled by code object, and would
    try the guards of all other models first at every call, on the clock of whoever comes last.
    """
    code = loss_of.__code__.replace(co_name=f"loss_of_{name.replace('-', '_')}")
    own = types.FunctionType(code, loss_of.__globals__)
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend)
