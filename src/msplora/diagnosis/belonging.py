"""Were base and adapter made for each other, and is all of the file in the model?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from transformers import AutoTokenizer

from msplora import _peft
from msplora.analysis.reading_lora import without_adapter_name
from msplora.forms import WRAPPED
from msplora.inspection.adapter import look_at_adapter
from msplora.inspection.suspicions import NOT_WHOLE, some
from msplora.inspection.tensor_file import TensorFiles
from msplora.loading import WEIGHTS_FILE, is_copy
from msplora.matching import input_embedding
from msplora.rewritten_base import CONVERT, not_repeated
from msplora.same_source import same_source

from .patient import Patient
from .results import Check, figures

FILE = "the file is whole"
BASE = "made for this base"
LOADED = "all of it is loaded"
_MOST_SAID = 300
"""Letters of an error that is not ours."""
_OWN_CODE = (
    " The tokenizer beside the adapter brings its own Python code, which was not run: whether its "
    "tokens fit is not known."
)
_TRUST = "If you trust it, opt in with --trust-remote-code."


def file_is_whole(folder: Path, config: Any) -> Check:
    """What `msplora inspect` finds of the file alone, before a base can be blamed for it."""
    found = look_at_adapter(TensorFiles([folder / WEIGHTS_FILE]), config, lambda done, total: None)
    wrong = [its for its in found.findings if its.rule in NOT_WHOLE]
    numbers = figures(pairs=len(found.pairs), wrong=sum(len(its.where) for its in wrong))
    if wrong:
        said = " ".join(its.text for its in wrong)
        return Check(FILE, "failed", said, "See msplora inspect.", numbers)
    return Check(FILE, "passed", f"It holds {len(found.pairs)} pairs that fit.", "", numbers)


def base_fits(patient: Patient) -> Check:
    """The base's name, architecture and vocabulary; that the shapes fit is proved by loading."""
    found = _fits(patient)
    why = not_repeated(patient.config)
    if why is None or found.status == "failed":
        return found
    return replace(found, status="warning", said=f"{found.said} {why}", advice=CONVERT)


def _fits(patient: Patient) -> Check:
    named = patient.config.base_model_name_or_path
    recorded = getattr(patient.config, "revision", None)
    model_type = patient.base.config.model_type
    wanted = getattr(patient.config, "model_type", None)
    if wanted not in (None, model_type):
        return Check(
            BASE,
            "failed",
            f"It was made for a {wanted}, and this is a {model_type}.",
            "Pass the model that the adapter was made for.",
        )
    if patient.random_weights:
        said, _, advice = patient.random_weights.partition(". ")
        return Check(BASE, "failed", f"{said[0].upper()}{said[1:]}.", advice)
    tokens, unread = None, ""
    try:
        tokens = _tokens(patient.folder, patient.trust_remote_code)
    except Exception as error:  # the readers of tokenizers raise whatever they like
        if patient.trust_remote_code or "trust_remote_code" not in str(error):
            return _unreadable_tokenizer(error)
        unread = _OWN_CODE
    embedding = input_embedding(patient.base)
    rows = None if embedding is None else len(embedding[1])
    numbers = figures(**({"tokens": tokens} if tokens else {}), **({"rows": rows} if rows else {}))
    if tokens and rows and tokens > rows:
        return Check(
            BASE,
            "failed",
            f"The tokenizer beside the adapter has {tokens:,} tokens, and the base's embedding "
            f"{rows:,} rows.",
            "Pass the base that it was trained on, or resize its embeddings before loading.",
            numbers,
        )
    vocabulary = f", {tokens:,} tokens of {rows:,}" if tokens and rows else ""
    said = f"Names and shapes fit a {model_type}{vocabulary}."
    said += _resized(patient, embedding[0], rows) if embedding and rows else ""
    said += f" {patient.random_pooler}" if patient.random_pooler else ""
    if not named:
        said += " The adapter does not name its base."
    elif not same_source(named, patient.source):
        return Check(
            BASE,
            "warning",
            f"{said} But the adapter names {named!r}.{unread}",
            "If this is that model in another place, all is well; a different one of the same "
            "shape gives wrong answers without an error.",
            numbers,
        )
    elif recorded and recorded != patient.revision:
        return Check(
            BASE,
            "warning",
            f"{said} It is the base that the adapter names, but at revision {patient.revision!r}, "
            f"where the adapter names {recorded!r}.{unread}",
            "Leave --revision out to examine it on the revision that it was trained on.",
            numbers,
        )
    else:
        said += " It is the base that the adapter names."
    if unread:
        return Check(BASE, "skipped", f"{said}{unread}", _TRUST, numbers)
    return Check(BASE, "passed", said, "", numbers)


def _unreadable_tokenizer(error: Exception) -> Check:
    return Check(
        BASE,
        "failed",
        f"The tokenizer beside the adapter cannot be read: {type(error).__name__}: "
        f"{' '.join(str(error).split())[:_MOST_SAID]}",
        "Copy its files again, or take them away to use the base's tokenizer.",
    )


def _resized(patient: Patient, path: str, rows: int) -> str:
    """What was done where the adapter brings embeddings of another number than the base's."""
    own = patient.own_vocabulary
    brought = {f"{WRAPPED}{path}.weight", f"{WRAPPED}{path}.base_layer.weight"}
    if own in (None, rows) or not brought & set(patient.tensors):
        return ""
    return (
        f" The adapter brings embeddings of {rows:,} tokens, and the base has {own:,}: it was "
        f"given as many, as before the training."
    )


def _tokens(folder: Path, trust_remote_code: bool) -> int | None:
    """The tokens of the tokenizer that was saved with the adapter, if there is one."""
    names = ("tokenizer.json", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        return None
    return len(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code))


def everything_is_loaded(patient: Patient) -> Check:
    """Each tensor of the file is in the model with its numbers, and no pair is without one.

    PEFT leaves out what it finds no place for. What it translates on the way, as other releases of
    transformers name or store some weights otherwise, is compared as it is loaded.
    """
    held: dict[str, Any] = dict(
        get_peft_model_state_dict(patient.model, save_embedding_layers=False)
    )
    whole = patient.model.state_dict()
    tensors = {without_adapter_name(name): its for name, its in patient.tensors.items()}
    loaded = _peft.as_loaded(patient.model, patient.config, tensors)
    lost, changed = [], []
    for name, its in loaded.items():
        found = held.get(name, whole.get(name))
        if found is None:
            if not is_copy(name, loaded):
                lost.append(name)
        elif found.shape != its.shape or not torch.equal(found.cpu(), its.to(found.dtype)):
            changed.append(name)
    new = [name for name in held if name not in loaded]
    count = len(patient.tensors)
    numbers = figures(tensors=count, lost=len(lost), changed=len(changed), new=len(new))
    if not lost and not changed and not new:
        said = f"All {count} tensors of the file are in it."
        if loaded.keys() != tensors.keys():
            said += " Their names are another transformers', which PEFT translates."
        return Check(LOADED, "passed", said, "", numbers)
    parts = [
        f"{len(names)} {what}: {some(names)}"
        for names, what in (
            (lost, "tensor(s) of the file have no place in the model"),
            (changed, "have other numbers there"),
            (new, "of the model's are not in the file and have their first numbers"),
        )
        if names
    ]
    return Check(
        LOADED,
        "failed",
        f"{'; '.join(parts)}.",
        _advice(patient, places=bool(lost), numbers=bool(changed)),
        numbers,
    )


def _advice(patient: Patient, places: bool, numbers: bool) -> str:
    """By what is wrong: places that are missing, or numbers that are others."""
    if not patient.is_whole:
        return "It is the file that is not whole, as said above; save or copy it again."
    if places:
        return (
            "The base names its modules otherwise than the one it was trained on, or has fewer; "
            "pass that one, or the version of transformers it was trained with."
        )
    if numbers:
        return "Please report this, with the adapter's config."
    return "The file lacks them: save or copy it again, or pass the base that it was trained on."
