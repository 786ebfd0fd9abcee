"""A model without its weights that can be trained all the same: its tensors only have shapes."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode
from transformers.utils import import_utils


def weightless_copy(
    model: nn.Module, fake: FakeTensorMode, frozen: Mapping[torch.dtype, torch.dtype] | None = None
) -> Any:
    """A copy of a model on the meta device whose tensors say that they are on the CPU.

    Args:
        model: what to copy; tensors that modules share stay shared.
        fake: makes the tensors.
        frozen: the dtypes of frozen weights that become others.
    """
    made: dict[int, Any] = {}

    def without_storage(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        tensor = tensor.detach().to("meta", dtype)
        return fake.fake_tensor_converter.from_meta_and_device(fake, tensor, torch.device("cpu"))

    for parameter in model.parameters():
        dtype = parameter.dtype
        if frozen and not parameter.requires_grad:
            dtype = frozen.get(dtype, dtype)
        tensor = without_storage(parameter.data, dtype)
        made[id(parameter)] = nn.Parameter(tensor, parameter.requires_grad)
    for buffer in model.buffers():
        made[id(buffer)] = without_storage(buffer)

    class OthersToo(TorchFunctionMode):
        """Tensors that a module keeps beside its parameters and buffers."""

        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func is not Tensor.__deepcopy__:
                return func(*args, **(kwargs or {}))
            tensor, memo = args
            return memo.setdefault(id(tensor), without_storage(tensor))

    with OthersToo():
        copied = copy.deepcopy(model, made)
        for parameter in model.parameters():
            if type(parameter) is not nn.Parameter:  # a quantised one, with its scales
                for name, value in vars(parameter).items():
                    setattr(made[id(parameter)], name, copy.deepcopy(value, made))
    # It is where it should be, and torch refuses to swap such tensors for others.
    copied.__dict__["to"] = lambda *_, **__: copied
    return copied


def is_weightless(model: nn.Module) -> bool:
    """Whether a model is such a copy."""
    return isinstance(next(model.parameters()), FakeTensor)


class Instead(TorchFunctionMode, ABC):
    """Does something else where a function of torch is called, in backward too."""

    @abstractmethod
    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the call gives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plain = not any(kwargs.get(key) for key in ("gradient", "create_graph", "inputs"))
        if func is not Tensor.backward or len(args) != 1 or not plain:
            return self.call(func, args, kwargs)
        # A mode is off while it handles a call, but backward runs parts of the model again where
        # activations are recomputed. Past `torch.autograd.backward`, which would come here too.
        with self:
            return Variable._execution_engine.run_backward(
                args,
                (torch.ones_like(args[0]),),
                kwargs.get("retain_graph") or False,
                False,
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )


class _OnesForNumpy(Instead):
    """What leaves torch, for metrics, is ones."""

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is Tensor.numpy:
            return np.ones(args[0].shape, "f4" if args[0].dtype.is_floating_point else "i8")
        return func(*args, **kwargs)


def _no(_: Any) -> bool:
    return False


@contextmanager
def taken_for_real() -> Iterator[None]:
    """Let libraries do with tensors without storage what they do with others.

    transformers takes such a tensor for a sign that a graph is being exported, and then makes masks
    of attention that a real run leaves out.
    """
    with ExitStack() as stack:
        if hasattr(import_utils, "is_fake_tensor"):  # since transformers 5
            stack.enter_context(mock.patch.object(import_utils, "is_fake_tensor", _no))
        stack.enter_context(_OnesForNumpy())
        yield
