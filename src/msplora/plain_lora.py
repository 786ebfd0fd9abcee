"""The plain LoRA that a pyramid is: its tensors and its config, as every server reads them.

Each site of a pyramid is one LoRA of rank R = sum of its ranks (`product.py`), so this is exact.
Written for the servers: one R for all sites, alpha = R (a factor of 1 in every engine), only
long-known keys in the config, and no holes: where some blocks lack a kind, or q is adapted and its
v is not, servers that keep one tensor for all layers, or one for q, k and v, want zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import _peft
from .blocks import place
from .errors import ConfigError
from .layer import PyramidLayer
from .matching import inside_attention, own_modules
from .store import STORE_NAME

_WRAPPED = "base_model.model."
_ATTENTION_OUT = ".base_layer.out_proj"  # of an adapted nn.MultiheadAttention
# SGLang keeps q, k and v in one tensor, gate and up in another, and begins with q and with gate.
_SERVED_TOGETHER = {
    "q_proj": ("v_proj",),
    "k_proj": ("q_proj", "v_proj"),
    "v_proj": ("q_proj",),
    "up_proj": ("gate_proj",),
}

Padding = Literal["none", "pow2"] | int
"""Zeros up to a power of two, or up to a rank."""


def lora_of(
    model: Any,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype = torch.float32,
    pad_to: Padding = "none",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config of the plain LoRA that an adapter of a loaded model is.

    The factors are assembled in float32 and rounded once, to `dtype`.

    Returns:
        Tensors by the names PEFT saves a LoRA's under, and the content of adapter_config.json.
    """
    peft_config: Any = model.peft_config[adapter_name]
    root: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers: dict[str, Any] = {
        path: module
        for path, module in root.named_modules()
        if isinstance(module, PyramidLayer) and adapter_name in module.borrowed
    }
    rank = _rank_with_zeros(
        max(layer.borrowed[adapter_name].rank for layer in layers.values()), pad_to
    )
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        tensors |= _layer_tensors(layer, adapter_name, f"{_WRAPPED}{path}", rank, dtype)
    holes = {} if peft_config.use_dora else dict(_holes(root, layers, peft_config.layers_pattern))
    for path, (in_features, out_features) in holes.items():
        tensors[f"{_WRAPPED}{path}.lora_A.weight"] = torch.zeros(rank, in_features, dtype=dtype)
        tensors[f"{_WRAPPED}{path}.lora_B.weight"] = torch.zeros(out_features, rank, dtype=dtype)
    return tensors, _lora_config(root, peft_config, layers, set(holes), rank)


def check_padding(pad_to: Padding) -> None:
    """Refuse a padding that is none.

    Raises:
        ConfigError: it is neither "none" nor "pow2" nor a rank.
    """
    a_rank = isinstance(pad_to, int) and not isinstance(pad_to, bool) and pad_to > 0
    if not a_rank and pad_to not in ("none", "pow2"):
        raise ConfigError(f"pad_to is 'none', 'pow2' or a rank above 0, not {pad_to!r}.")


def _rank_with_zeros(rank: int, pad_to: Padding) -> int:
    if pad_to == "none":
        return rank
    if pad_to == "pow2":
        return 1 << (rank - 1).bit_length()
    if pad_to < rank:
        raise ConfigError(f"the LoRA has rank {rank}, which cannot be padded to {pad_to}.")
    return pad_to


def _holes(
    root: nn.Module, layers: Mapping[str, Any], layers_pattern: list[str] | str | None
) -> Iterator[tuple[str, tuple[int, int]]]:
    """The linear layers that are not adapted but have to be served like those that are.

    Yields:
        Path, (in, out).
    """
    wanted = set()
    for path, layer in layers.items():
        stack, block, kind = place(root, path, layers_pattern)
        # A weight's own pair, not one for a parameter, a convolution or an embedding.
        if block is None or "base_layer" in path or type(layer).__name__ == "ParamWrapper":
            continue
        parent, _, name = kind.rpartition(".")
        others = _SERVED_TOGETHER.get(name, ())
        wanted |= {(stack, kind)} | {(stack, f"{parent}.{other}") for other in others}
    for path, module in own_modules(root):
        if path in layers or isinstance(module, _peft.AuxiliaryTrainingWrapper):
            continue
        if isinstance(module, (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        stack, block, kind = place(root, path, layers_pattern)
        if block is None or (stack, kind) not in wanted or inside_attention(root, path):
            continue
        in_features, out_features = _peft.in_out_features(module)
        if in_features is not None and out_features is not None:
            yield path, (in_features, out_features)


def _layer_tensors(
    layer: Any, adapter_name: str, name: str, rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    borrowed = layer.borrowed[adapter_name]
    with torch.no_grad():
        a, b = (
            assembled.stacked([_here(factor().float()) for factor in assembled.factors])
            for assembled in (borrowed.a, borrowed.b)
        )
        if name.endswith(_ATTENTION_OUT) and _peft.lora_counts_out_proj_twice():
            b = b / 2
        blocks = getattr(layer, "num_experts", 1)
        a, b = _padded(a, b, rank, blocks)
        a, b = a.to(dtype).contiguous().clone(), b.to(dtype).contiguous().clone()
    if len(layer.lora_embedding_A):
        tensors = {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    else:
        tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    if adapter_name in layer.lora_magnitude_vector:
        magnitude = _here(layer.lora_magnitude_vector[adapter_name].weight.detach())
        tensors[f"{name}.lora_magnitude_vector"] = magnitude.to(dtype).clone()
    return tensors


def _here(tensor: Tensor) -> Tensor:
    """On the CPU; without storage where it has none."""
    return tensor if tensor.is_meta else tensor.cpu()


def _padded(a: Tensor, b: Tensor, rank: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Zero rows of A and columns of B up to `rank` (of each expert)."""
    missing = rank - a.shape[0] // blocks
    if not missing:
        return a, b
    rest = a.shape[1:]
    rows = a.new_zeros(blocks, missing, *rest)
    a = torch.cat([a.reshape(blocks, -1, *rest), rows], dim=1).flatten(0, 1)
    columns = b.new_zeros(b.shape[0], missing * blocks, *b.shape[2:])
    return a, torch.cat([b, columns], dim=1)


def _lora_config(
    root: nn.Module, config: Any, layers: Mapping[str, Any], holes: set[str], rank: int
) -> dict[str, Any]:
    """Long-known keys only: servers read them with older releases of PEFT."""
    task = config.task_type
    content = {
        "peft_type": "LORA",
        "task_type": getattr(task, "value", task),
        "auto_mapping": config.auto_mapping,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(root, holes),
        "fan_in_fan_out": any(
            getattr(layer, "fan_in_fan_out", False) and not len(layer.lora_embedding_A)
            for layer in layers.values()
        ),
        "bias": "lora_only" if config.bias == "msplora_only" else config.bias,
        "modules_to_save": sorted(set(config.modules_to_save)) if config.modules_to_save else None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "use_rslora": False,
        "use_dora": config.use_dora,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    for name in ("target_parameters", "trainable_token_indices"):
        if getattr(config, name, None):
            content[name] = getattr(config, name)
    if config.ensure_weight_tying:
        content["ensure_weight_tying"] = True
    return content


def _target_modules(root: nn.Module, holes: set[str]) -> list[str]:
    """The names of the adapted modules' last parts, where those select just these modules."""
    sites = {
        path.removesuffix(".base_layer.out_proj")
        for path, module in root.named_modules()
        if isinstance(module, PyramidLayer) and type(module).__name__ != "ParamWrapper"
    }
    sites = {path for path in sites if ".base_layer" not in path} | holes
    leaves = sorted({path.rpartition(".")[2] for path in sites})
    selected = {
        path
        for path, _ in root.named_modules()
        if not path.startswith(STORE_NAME)
        and ".base_layer" not in path
        and path.rpartition(".")[2] in leaves
    }
    return leaves if selected == sites else sorted(sites)
