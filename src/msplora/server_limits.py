"""What an adapter asks of a server, and the refusal, before anything is written, of what it lacks.

A server that reads half an adapter serves another model and says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from . import _peft
from .adapted import name_in_base
from .errors import ConfigError, UnsupportedError
from .language_model import outside_language_model
from .layer import PyramidLayer
from .serving import SERVERS, WRITTEN_FOR, Form, Server

_HEADS = {"classifier", "score"}


def features(
    model: Any, others: Mapping[str, Tensor] | None = None, adapter_name: str = "default"
) -> dict[str, str]:
    """What an adapter holds beyond updates of linear layers: the feature, and where it is.

    Args:
        model: a base model with an adapter of it.
        others: what its file holds besides pairs: embeddings are saved without a word in a config.
        adapter_name: which adapter.
    """
    config: Any = model.peft_config[adapter_name]
    root: Any = model.get_base_model()
    found: dict[str, str] = {}
    if config.use_dora:
        found["DoRA"] = "use_dora"
    if config.bias != "none":
        found["biases"] = f"bias={config.bias!r}"
    if getattr(config, "trainable_token_indices", None):
        found["trained tokens"] = "trainable_token_indices"
    wrapped = []
    outside = outside_language_model(root)
    for path, layer in root.named_modules():
        if isinstance(layer, _peft.AuxiliaryTrainingWrapper):
            wrapped.append(path)
            if adapter_name in getattr(layer, "modules_to_save", ()):
                is_head = path.rpartition(".")[2] in _HEADS
                kind = "classifier's head" if is_head else "saved modules"
                found.setdefault(kind, f"modules_to_save holds {path!r}")
        elif isinstance(layer, PyramidLayer) and adapter_name in layer.borrowed:
            kind = _kind(layer)
            if kind is not None:
                found.setdefault(kind, path)
            if outside(path):
                found.setdefault("outside the language model", path)
    for key in others or ():
        path, _, name = name_in_base(key).rpartition(".")
        known = any(path == its or path.startswith(f"{its}.") for its in wrapped)
        if not known and not (name == "bias" and config.bias != "none"):
            found.setdefault("saved modules", f"its file holds {path!r} whole")
    return found | _base_features(root)


def _base_features(root: Any) -> dict[str, str]:
    """What its base is that a server of decoders does not know."""
    its: Any = getattr(root, "config", None)
    try:
        text = its.get_text_config()
    except (AttributeError, ValueError):  # no config of transformers; several texts
        return {}
    said = f"its base is a {type(root).__name__}"
    hears: Any = getattr(root, "main_input_name", "input_ids") != "input_ids"  # Whisper is served
    if its.is_encoder_decoder and not hears:
        return {"encoder and decoder": said}
    if getattr(text, "vocab_size", None) is None:
        return {"no language model": said}
    return {}


def _kind(layer: Any) -> str | None:
    base = layer.get_base_layer()
    if type(layer).__name__ == "ParamWrapper":
        return "experts"
    if isinstance(base, nn.Embedding):
        return "embedding"
    if isinstance(base, nn.MultiheadAttention):
        return "attention module"
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "convolution"
    return "Conv1D" if type(base).__name__ == "Conv1D" else None


def asked_server(name: str | None, form: Form, max_lora_rank: int | None = None) -> Server | None:
    """Return the server that is converted for, if any; refuse what needs no adapter to be refused.

    Args:
        name: one of `SERVERS`; if left out, the one server that reads the form, if there is one.
        form: what is to be written.
        max_lora_rank: what the server is started with, where a flag of it sets the limit.

    Raises:
        ConfigError: there is no such server, it reads another form, or its flag takes no such
            value.
    """
    name = name or WRITTEN_FOR.get(form)
    if name is None:
        if max_lora_rank is not None:
            raise ConfigError("max_lora_rank is a server's limit: say which with --for.")
        return None
    if name not in SERVERS:
        raise ConfigError(f"no server {name!r}; there are {', '.join(SERVERS)}.")
    server = SERVERS[name]
    if form != server.form:
        raise ConfigError(
            f"{server.title} does not read that form: convert with --to {server.form}."
        )
    if max_lora_rank is None:
        return server
    if server.flag is None:
        raise ConfigError(f"{server.title} has no limit of the rank, and no --max-lora-rank.")
    if server.ranks is not None and max_lora_rank not in server.ranks:
        raise ConfigError(
            f"{server.title}'s {server.flag} takes {', '.join(map(str, server.ranks))}, not "
            f"{max_lora_rank}."
        )
    return server


def check_features(found: Mapping[str, str], server: Server) -> None:
    """Refuse to convert for a server what it cannot serve whatever its rank.

    Raises:
        UnsupportedError: the server lacks a feature of the adapter, one of `features`.
    """
    _refuse(_lacking(found, server))


def check_served(
    found: Mapping[str, str], server: Server, rank: int, max_lora_rank: int | None = None
) -> None:
    """Refuse to convert for a server what it cannot serve.

    Args:
        found: the `features` of the adapter.
        server: see `asked_server`.
        rank: of the LoRA that would be written.
        max_lora_rank: as asked.

    Raises:
        UnsupportedError: the server lacks a feature, or the rank is above its limit.
    """
    _refuse(why_not_served(found, server, rank))
    if max_lora_rank is not None and rank > max_lora_rank:
        lifted = server.flag_for(rank) or f"{server.flag} {rank}"
        raise UnsupportedError(
            f"the LoRA has rank {rank}, above the {max_lora_rank} of {server.title}'s "
            f"{server.flag}. Start it with {lifted}."
        )


def why_not_served(found: Mapping[str, str], server: Server, rank: int) -> str | None:
    """What of an adapter a server lacks, or that its rank is above any limit of it."""
    lacking = _lacking(found, server)
    if lacking is None and server.ranks is not None and rank > server.ranks[-1]:
        return (
            f"the LoRA has rank {rank}, and {server.title}'s {server.flag} goes up to "
            f"{server.ranks[-1]}"
        )
    return lacking


def _lacking(found: Mapping[str, str], server: Server) -> str | None:
    for feature, where in found.items():
        if feature in server.lacks:
            return f"{server.title} cannot serve this adapter ({where}): {server.lacks[feature]}"
    return None


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise UnsupportedError(f"{reason}. Serve the merged model: --to merged.")
