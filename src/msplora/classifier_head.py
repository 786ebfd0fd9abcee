"""The head of a classifier that was saved with an adapter: how many answers it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

CLASSIFIERS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForImageClassification",
)
"""How the names of transformers' classes end that have one."""
_BEFORE_A_HEAD = ("pooler", "embed", "norm", "pre_classifier", "wte", "wpe")
"""What the names of modules hold that a model has before its head."""


def may_be_head(name: str) -> bool:
    """Whether a module of `modules_to_save` may be the one that answers."""
    return not any(its in name.lower() for its in _BEFORE_A_HEAD)


def number_of_labels(
    config: Any, tensors: Mapping[str, Tensor], classes: Sequence[str]
) -> int | None:
    """The outputs of a classifier's head that was saved with the adapter."""
    for suffix in ("classifier.out_proj.weight", "classifier.weight", "score.weight"):
        for key, tensor in tensors.items():
            if key.endswith(suffix) and tensor.ndim == 2:
                return tensor.shape[0]
    if classes:
        return len(classes)
    # T5's and BART's is called classification_head, XLNet's logits_proj; its last layer answers.
    names = tuple(filter(may_be_head, config.modules_to_save or ()))
    of_head = [
        tensor
        for key, tensor in sorted(tensors.items())
        if tensor.ndim == 2 and any(f".{name}." in key for name in names)
    ]
    return of_head[-1].shape[0] if of_head else None


def label_options(
    config: Any, tensors: Mapping[str, Tensor], classes: Sequence[str]
) -> dict[str, Any]:
    """What the base's config is to be given, so that the adapter's head fits: none of no head."""
    labels = number_of_labels(config, tensors, classes)
    options: dict[str, Any] = {"num_labels": labels} if labels else {}
    if classes and len(classes) == labels:
        options["id2label"] = dict(enumerate(classes))
        options["label2id"] = {name: place for place, name in enumerate(classes)}
    return options


def labels_of(model: Any) -> int | None:
    """The answers that an adapted model gives, if it is a classifier."""
    root = model.get_base_model()
    return root.config.num_labels if type(root).__name__.endswith(CLASSIFIERS) else None
