"""An adapter on its base, loaded by PEFT: with all that its file holds, and nothing left random.

PEFT is lenient. It says nothing of tensors that find no place and only warns of layers that find no
tensors; and embeddings saved with an adapter overwrite the base's own, which unloading does not
bring back. Here the first two are errors, and the base can be had as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer

from . import _peft
from .errors import AdapterFileError, MSPLoraError
from .forms import WRAPPED
from .loading import (
    BaseOptions,
    class_names,
    is_copy,
    load_base_of,
    open_tensors,
    read_config,
    read_tensors,
)
from .random_weights import warn_of_new_rows
from .store import STORE_NAME

# Not a module of the base that is named like an adapter's, as a `lora_head`.
_OF_PAIRS = re.compile(
    rf"(^|\.){STORE_NAME}\.|\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)"
)
_TOKENS = "token_adapter"
"""What PEFT puts around an embedding of which single tokens are trained."""
_SAID = 300
"""Letters of an error that is not ours."""


class Adapted:
    """A base with an adapter of it.

    Attributes:
        model: the two, ready for inference; gone when the base is taken out.
        tensors: what the adapter's file holds.
        others: of these, what belongs to no pair: a head, biases, trained tokens. Embeddings that
            PEFT saved along are among them only where they are not the base's own.
        vocabulary: how many embeddings the base was given for the adapter, if it had another
            number.
    """

    def __init__(
        self,
        model: PeftModel,
        tensors: Mapping[str, Tensor],
        own: Mapping[str, Tensor] | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.tensors = dict(tensors)
        self._own = dict(own or {})
        redundant = {
            key
            for key in self.embeddings()
            if key in tensors and _equal(tensors[key], self._own.get(name_in_base(key)))
        }
        self.others = {
            key: its for key, its in other_tensors(tensors).items() if key not in redundant
        }

    def take_base(self) -> Any:
        """The base as it was before it was adapted, and no longer its adapter.

        Where the adapter brings more embeddings than the base has it keeps their number, so that
        the adapter can be put on again; the new ones are zero.
        """
        base: Any = self.model.unload()
        del self.model
        with torch.no_grad():
            state = base.state_dict()
            for name, its in self._own.items():
                if state[name].shape != its.shape:
                    state[name].zero_()[: its.shape[0]] = its[: state[name].shape[0]].to(
                        state[name]
                    )
                else:
                    state[name].copy_(its)
        return base

    def embeddings(self) -> set[str]:
        """The names that the whole embeddings of this model have in an adapter's file."""
        root: Any = self.model.get_base_model()
        return {
            f"{WRAPPED}{name}"
            for path, module in embeddings_of(root)
            if not isinstance(module, _peft.AuxiliaryTrainingWrapper)
            for name in (f"{path}.weight", f"{path}.bias", f"{path}.base_layer.weight")
        }


def load_on_base(folder: Path, base: BaseOptions | None = None) -> Adapted:
    """Load the base model an adapter names and put the adapter on it, ready for inference.

    Raises:
        MSPLoraError: the adapter or its base cannot be loaded, or they do not fit.
    """
    tensors = read_tensors(folder)
    config = read_config(folder)
    model = load_base_of(config, tensors, base or BaseOptions(), class_names(folder))
    _set_padding(model, folder)
    state = model.state_dict()
    names = {name for key in tensors if (name := name_in_base(key)) in state}
    own = {name: state[name].clone() for name in names}
    vocabulary = fit_vocabulary(model, tensors)
    return Adapted(put_on(model, folder), tensors, own, vocabulary)


def load_adapted(folder: Path, base: BaseOptions | None = None) -> PeftModel:
    """As `load_on_base`, the model alone."""
    return load_on_base(folder, base).model


def put_on(base: Any, folder: Path) -> PeftModel:
    """An adapter on a base.

    Raises:
        AdapterFileError: its file holds what the base has no place for, or lacks what it needs.
    """
    said = f"{str(folder)!r} does not fit {type(base).__name__}"
    ask = "Is it whole, and was it made for this base model?"
    with open_tensors(folder) as opened:
        names = set(opened.keys())
    try:
        with _load_results(base) as results:
            model: Any = PeftModel.from_pretrained(base, str(folder)).eval()
    except (MSPLoraError, torch.OutOfMemoryError):
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:_SAID]}"
        raise AdapterFileError(f"{said} ({reason}). {ask}") from error
    prefix = model.base_model.prefix
    for missing, unexpected in results:
        lacking = sorted(name for name in missing if prefix in name and ".default" in name)
        unexpected = [name for name in unexpected if not is_copy(name, names)]
        if lacking or unexpected:
            found = f"lacks {lacking[0]!r}" if lacking else f"holds {unexpected[0]!r} besides"
            raise AdapterFileError(f"{said}: it {found}. {ask}")
    return model


@contextmanager
def _load_results(base: nn.Module) -> Iterator[list[tuple[list[str], list[str]]]]:
    """What PEFT found missing and left over: whatever the names are converted to on the way."""
    results: list[tuple[list[str], list[str]]] = []

    def keep(_: nn.Module, keys: Any) -> None:
        results.append((list(keys.missing_keys), list(keys.unexpected_keys)))

    handle = base.register_load_state_dict_post_hook(keep)
    try:
        yield results
    finally:
        handle.remove()


def other_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter's file holds besides pairs: a head, biases, trained tokens."""
    return {
        key: its
        for key, its in tensors.items()
        if not _OF_PAIRS.search(key) and not is_copy(key, tensors)
    }


def name_in_base(key: str) -> str:
    """What a tensor of an adapter's file is called in the base without an adapter."""
    return key.removeprefix(WRAPPED).replace(".base_layer.", ".")


def embeddings_of(root: Any) -> Iterator[tuple[str, nn.Module]]:
    """The embedding and the head of a language model, with their paths, adapted or not."""
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            wanted = getattr(root, get)()
        except (AttributeError, NotImplementedError):
            continue
        for path, module in root.named_modules():
            if module is wanted and path:
                yield path, module


def fit_vocabulary(base: Any, tensors: Mapping[str, Tensor]) -> int | None:
    """Give the base as many embeddings as the adapter's file holds, as before its training."""
    own: dict[str, Tensor] = {
        path: its
        for path, module in embeddings_of(base)
        if isinstance(its := getattr(module, "weight", None), Tensor)
    }
    brought: dict[str, Tensor] = {}
    for path, its in own.items():
        for name in ("weight", "base_layer.weight", f"{_TOKENS}.base_layer.weight"):
            saved = tensors.get(f"{WRAPPED}{path}.{name}")
            if saved is not None and saved.shape[1:] == its.shape[1:]:
                brought[path] = saved
    others = [len(saved) for path, saved in brought.items() if len(saved) != len(own[path])]
    wanted = others[-1] if others else None
    if wanted is not None:
        filled = [own[path] for path in brought]
        made_up = [
            f"{path}.weight"
            for path, its in own.items()
            if len(its) < wanted
            and not any(its is one for one in filled)
            and f"{WRAPPED}{path}.{_TOKENS}.trainable_tokens_delta" not in tensors
        ]
        warn_of_new_rows(made_up, wanted)
        base.resize_token_embeddings(wanted, mean_resizing=False)
    return wanted


def _set_padding(base: Any, folder: Path) -> None:
    """Give a classifier that answers at the last token the padding it was trained with.

    Without it such a model answers single rows only. Training takes it from the tokenizer, which
    lies beside the adapter.
    """
    if not type(base).__name__.endswith("ForSequenceClassification"):
        return
    text: Any = base.config.get_text_config()
    if getattr(text, "pad_token_id", None) is None and (folder / "tokenizer_config.json").is_file():
        text.pad_token_id = AutoTokenizer.from_pretrained(str(folder)).pad_token_id


def _equal(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one.to(other), other)
