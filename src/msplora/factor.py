"""One A or B of one adapter, as a module: what holds a parameter and what others hook into."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

PLAIN = (nn.Parameter, Tensor, FakeTensor)
"""The types of tensors that are nothing else (quantised, sharded); a dry run's have no storage."""


class Factor(nn.Module):
    """One A or B of one adapter. Calling it gives the live parameter.

    Offloading and sharding frameworks bring it to where it is used by hooks on this module.
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(tensor)

    def forward(self) -> Tensor:
        if hasattr(self.factor, "ds_id"):
            return self.factor.clone()  # ZeRO-3 empties the parameter when this call is over
        return self.factor

    def value(self) -> Tensor:
        """What a call gives, without its cost where nobody hooked in: it tells in small layers."""
        found = self.unhooked()
        return self() if found is None else found

    def unhooked(self) -> Tensor | None:
        """What a call gives, `None` if somebody hooked in."""
        own = self.__dict__
        if own["_forward_pre_hooks"] or own["_forward_hooks"] or "forward" in own:
            return None
        return self.stored()

    def stored(self) -> Tensor:
        """What is here now, whoever hooked in."""
        found = self._parameters.get("factor")
        return self.factor if found is None else found  # FSDP puts a view in the parameter's place

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args: Any) -> None:
        # Assigning (low_cpu_mem_usage) replaces the parameter: keep the dtype that was asked for,
        # so that every road of loading gives the same numbers.
        key = f"{prefix}factor"
        if local_metadata.get("assign_to_params_buffers") and key in state_dict:
            state_dict[key] = state_dict[key].to(self.factor.dtype)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        return str(tuple(self.factor.shape))
