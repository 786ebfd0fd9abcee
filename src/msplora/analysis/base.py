"""The base of an adapter: its shapes without its weights, and its weights one by one."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from msplora.adapted import embeddings_of, fit_vocabulary
from msplora.errors import BaseModelError, TargetError
from msplora.loading import BaseOptions, loading_errors_explained, resolve_source, without_weights
from msplora.matching import module_shape
from msplora.parameters import shape_of
from msplora.pyramid import Shape
from msplora.random_weights import RandomWeightsWarning

from .checkpoint_names import by_names_of_model
from .weight_files import download_weights, weight_files

_FLOATS = ("F64", "F32", "F16", "BF16")
"""What is not stored in one of these is quantised."""
_WEIGHTS = ("weight", "in_proj_weight")
_PACKED = ("qweight", "weight_packed")
"""In place of a weight: GPTQ's and AWQ's, compressed-tensors'."""


class _Stored(NamedTuple):
    """Where a tensor is, and what the head of its file says of it."""

    file: Path
    dtype: str
    """As safetensors has it."""
    shape: tuple[int, ...]


class Base:
    """A base model of which nothing is loaded until it is asked for.

    Raises:
        BaseModelError: there is no such model.
    """

    def __init__(self, options: BaseOptions, config: PeftConfig) -> None:
        assert options.source
        self.source = resolve_source(options.source)
        self._options, self._adapter = options, config
        self._revision = options.revision_for(config)
        with loading_errors_explained(self.source):
            self._config = transformers.AutoConfig.from_pretrained(
                self.source,
                revision=self._revision,
                trust_remote_code=options.trust_remote_code,
            )
        self.model_type: str = self._config.model_type
        self.weights = self.source, self._revision
        """What tells whose weights are the same: an adapter may name a revision of its base."""

    @cached_property
    def model(self) -> nn.Module:
        """The model on the meta device, of the class that it was adapted with."""
        return without_weights(self._adapter, self._config, self.source, self._options)

    def take_tokens_of(self, tensors: Mapping[str, Tensor]) -> None:
        """Give it as many embeddings as an adapter's file holds: the training may have added some.

        Args:
            tensors: the file's, of which shapes are enough.
        """
        with warnings.catch_warnings():  # that rows would be random: here none has numbers
            warnings.simplefilter("ignore", RandomWeightsWarning)
            fit_vocabulary(self.model, tensors)

    def has(self, key: str, shape: tuple[int, int]) -> bool:
        """Whether the checkpoint has the weight of a module as one matrix (out, in) of that shape.

        The heads of its files tell. A convolution's counts as (O, I · kernel), an attention's is
        that of query, key and value. Transformers may store several weights as one.
        """
        name = self._stored(key)
        if name is None:
            return False
        of_file = torch.empty(self._files[name].shape, device="meta")
        return self._as_matrix(key, of_file).shape == shape

    def weight(self, key: str, shape: tuple[int, int]) -> Tensor | None:
        """The weight of a module as such a matrix, in its own dtype; None where it has it not.

        Raises:
            BaseModelError: the weight is quantised, or its file cannot be read.
        """
        name = self._stored(key)
        if name is None or not self.has(key, shape):
            return None
        self._refuse_quantised(name)
        file = self._files[name].file
        try:
            with safe_open(file, framework="pt") as opened:
                weight = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BaseModelError(f"{str(file)!r} cannot be read: {error}.") from error
        if not bool(weight.isfinite().all()):
            raise BaseModelError(
                f"{str(file)!r}: {name!r} holds values that are not finite. The file is damaged, "
                f"or its training diverged; copy or download the base again."
            )
        return self._as_matrix(key, weight)

    def _as_matrix(self, key: str, weight: Tensor) -> Tensor:
        module = self.module(key)
        if isinstance(module, (Conv1D, nn.Embedding)):
            return weight.t()
        return weight.flatten(1) if isinstance(module, nn.Module) and weight.ndim > 2 else weight

    def _stored(self, key: str) -> str | None:
        """The name in the files of a module's weight, or of the one that it is tied to."""
        prefix = getattr(self.model, "base_model_prefix", "") + "."
        for path in (key, *self._tied_to(key)):
            names = [path, *(f"{path}.{end}" for end in (*_WEIGHTS, *_PACKED))]
            names += [its.removeprefix(prefix) for its in names] + [prefix + its for its in names]
            for name in names:
                if name in self._names:
                    return self._names[name]
        return None

    def _tied_to(self, key: str) -> list[str]:
        """The path of the embedding, if `key` is the head that has its weight; or the reverse."""
        config = self._config.get_text_config()
        if key not in self._embeddings or not getattr(config, "tie_word_embeddings", False):
            return []
        return [path for path in self._embeddings if path != key]

    @cached_property
    def _embeddings(self) -> list[str]:
        """The paths of the embedding and of the head."""
        return [path for path, _ in embeddings_of(self.model)]

    def module(self, key: str) -> Any:
        """The module, or the parameter, of that path; None where there is none."""
        found: Any = self.model
        for name in key.split("."):
            found = getattr(found, name, None)
        return found

    def shape(self, key: str) -> Shape | None:
        """Of the weight of that path, as a pair sees it; None where LoRA adapts none such."""
        found, (parent, _, name) = self.module(key), key.rpartition(".")
        try:
            if isinstance(found, nn.MultiheadAttention):
                return Shape("linear", 3 * found.embed_dim, found.embed_dim)
            if isinstance(found, nn.Module):
                return module_shape(key, found)
            return None if found is None else shape_of(self.module(parent), key, name)
        except TargetError:
            return None

    def check_weights(self, keys: Iterable[str]) -> None:
        """Refuse a base whose weights cannot be read one by one, by the heads of its files.

        Args:
            keys: the paths of the modules whose weights will be read.

        Raises:
            BaseModelError: it has none in safetensors, or they are quantised.
        """
        for name in map(self._stored, keys):
            if name is not None:
                self._refuse_quantised(name)

    def _refuse_quantised(self, name: str) -> None:
        dtype = self._files[name].dtype
        if dtype not in _FLOATS:
            raise BaseModelError(
                f"the base {self.source!r} stores {name!r} as {dtype}: it is quantised. Pass "
                f"--base with the model that it was made from."
            )

    @cached_property
    def _names(self) -> dict[str, str]:
        """The name of a tensor as the model has it → the files' own."""
        return by_names_of_model(self.model, self._files)

    @cached_property
    def _files(self) -> dict[str, _Stored]:
        """By the name of a tensor."""
        folder = Path(self.source)
        if not folder.is_dir():
            with loading_errors_explained(self.source):
                folder = download_weights(self.source, self._revision)
        with loading_errors_explained(self.source):
            files = weight_files(folder)
        if not files:
            raise BaseModelError(
                f"the base {self.source!r} has no weights in safetensors, which are read one by "
                f"one. Save it again with safe_serialization=True."
            )
        found = {}
        for file in files:
            with loading_errors_explained(self.source), safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                    its = opened.get_slice(name)
                    found[name] = _Stored(file, str(its.get_dtype()), tuple(its.get_shape()))
        return found
