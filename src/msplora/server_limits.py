"""What an adapter asks of a server, and the refusal, before anything is written, of what it lacks.

A server that reads half an adapter serves another model and says nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import ConfigError, UnsupportedError
from .layer import PyramidLayer
from .serving import SERVERS, WRITTEN_FOR, Form, Server

_HEADS = {"classifier", "score"}


def features(model: Any, adapter_name: str = "default") -> dict[str, str]:
    """What an adapter holds beyond updates of linear layers: the feature, and where it is.

    Args:
        model: a base model with an adapter of it.
    """
    config: Any = model.peft_config[adapter_name]
    root: Any = model.get_base_model()
    found: dict[str, str] = {}
    if config.use_dora:
        found["DoRA"] = "use_dora"
    if config.bias != "none":
        found["biases"] = f"bias={config.bias!r}"
    for name in sorted(set(config.modules_to_save or ())):
        if any(path.rpartition(".")[2] == name for path, _ in root.named_modules()):
            kind = "classifier's head" if name in _HEADS else "saved modules"
            found[kind] = f"modules_to_save names {name!r}"
    if getattr(config, "trainable_token_indices", None):
        found["trained tokens"] = "trainable_token_indices"
    for path, layer in root.named_modules():
        if isinstance(layer, PyramidLayer) and adapter_name in layer.borrowed:
            kind = _kind(layer)
            if kind is not None:
                found.setdefault(kind, path)
    return found


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


def check_served(model: Any, server: Server, rank: int, max_lora_rank: int | None = None) -> None:
    """Refuse to convert for a server what it cannot serve.

    Args:
        model: the base with the adapter.
        server: see `asked_server`.
        rank: of the LoRA that would be written.
        max_lora_rank: as asked.

    Raises:
        UnsupportedError: the server lacks a feature, or the rank is above its limit.
    """
    for feature, where in features(model).items():
        if feature in server.lacks:
            raise UnsupportedError(
                f"{server.title} cannot serve this adapter ({where}): {server.lacks[feature]}. "
                f"Serve the merged model: --to merged."
            )
    if server.ranks is not None and rank > server.ranks[-1]:
        raise UnsupportedError(
            f"the LoRA has rank {rank}, and {server.title}'s {server.flag} goes up to "
            f"{server.ranks[-1]}. Serve the merged model: --to merged."
        )
    if max_lora_rank is not None and rank > max_lora_rank:
        lifted = server.flag_for(rank) or f"{server.flag} {rank}"
        raise UnsupportedError(
            f"the LoRA has rank {rank}, above the {max_lora_rank} of {server.title}'s "
            f"{server.flag}. Start it with {lifted}."
        )
