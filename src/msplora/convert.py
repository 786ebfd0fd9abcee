"""Conversion, files to files: an MSPLoRA adapter to a plain LoRA, or into the base's weights.

Each site of a pyramid is one LoRA of rank R = sum of its ranks (`product.py`), so the plain LoRA is
exact. It is written for the servers: one R for all sites, alpha = R (a factor of 1 in every
engine), only long-known keys in its config.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from . import _peft
from .config import MSPLoraConfig
from .errors import ConfigError, UnsupportedError
from .folders import check_output, new_folder
from .layer import PyramidLayer
from .loading import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    BaseOptions,
    adapter_folder,
    check_finite,
    dtype_argument,
    load_adapted,
    quiet_loading,
    read_config,
    read_tensors,
    write_json,
)
from .store import STORE_NAME
from .verifying import Comparison, compare, logits, probe_inputs

_WRAPPED = "base_model.model."
_ATTENTION_OUT = ".base_layer.out_proj"  # of an adapted nn.MultiheadAttention
# What makes the adapter servable besides the adapter itself.
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template.*",
)


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote, and how it was proved."""

    out: Path
    rank: int
    """The rank of the plain LoRA."""
    source_bytes: int
    out_bytes: int
    comparison: Comparison | None
    """`None` if the check was skipped."""


def to_lora(
    source: str | Path,
    out: str | Path,
    *,
    base: BaseOptions | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    pad_to: Literal["none", "pow2"] = "none",
    verify: bool = True,
    force: bool = False,
) -> Converted:
    """Write an MSPLoRA adapter as a plain LoRA that PEFT and every LoRA server reads.

    Args:
        source: the adapter's folder, or a run's.
        out: the folder to write.
        base: how to load the base model; the adapter names it.
        dtype: of the tensors written.
        pad_to: "pow2" pads the rank with zeros to a power of two.
        verify: load base and result with PEFT and compare the logits before anything is written.
        force: replace `out` if it is not empty.

    Raises:
        MSPLoraError: the adapter or its base cannot be read, or the result is not the same.
    """
    folder, out = adapter_folder(Path(source)), Path(out)
    check_output(out, force)
    model = _load_pyramid(folder, base)
    tensors, config = lora_of(model, dtype=getattr(torch, dtype), pad_to=pad_to)
    tensors |= _other_tensors(read_tensors(folder))
    check_finite(tensors, f"the LoRA in {dtype}")
    with new_folder(out, force) as partial:
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(partial / CONFIG_FILE, config)
        _copy_tokenizer(folder, partial)
        comparison = None
        if verify:
            probe = _Probe(model)
            base_model: Any = model.unload()
            converted = PeftModel.from_pretrained(base_model, str(partial)).eval()
            dtypes = {base_model.dtype, getattr(torch, dtype)}
            comparison = probe.compare_with(converted, dtypes)
    return Converted(
        out, config["r"], _size(folder / WEIGHTS_FILE), _size(out / WEIGHTS_FILE), comparison
    )


def to_merged(
    source: str | Path,
    out: str | Path,
    *,
    base: BaseOptions | None = None,
    verify: bool = True,
    allow_quantized: bool = False,
    force: bool = False,
) -> Converted:
    """Add an adapter into its base's weights and save the whole model, without any adapter.

    Args:
        source: the adapter's folder, or a run's.
        out: the folder to write.
        base: how to load the base model, its dtype included; the adapter names it.
        verify: load the result and compare the logits before it takes its place.
        allow_quantized: merge into a quantised base, which rounds the sum again.
        force: replace `out` if it is not empty.

    Raises:
        MSPLoraError: the adapter or its base cannot be read, or the result is not the same.
    """
    folder, out = adapter_folder(Path(source)), Path(out)
    check_output(out, force)
    model = load_adapted(folder, base)
    base_model: Any = model.get_base_model()
    dtype = base_model.dtype
    if getattr(base_model, "is_quantized", False) and not allow_quantized:
        raise UnsupportedError(
            "the base is quantised: merging would round its weights a second time. Pass --base "
            "with the unquantised model, or --allow-quantized to accept that."
        )
    probe = _Probe(model) if verify else None
    rank = sum(_ranks(model))
    merged: Any = model.merge_and_unload(safe_merge=True)
    with new_folder(out, force) as partial:
        with quiet_loading():
            merged.save_pretrained(partial)
        _copy_tokenizer(folder, partial)
        comparison = None
        if probe is not None:
            with quiet_loading():
                options = {dtype_argument(): dtype}
                reloaded = type(merged).from_pretrained(partial, **options).eval()
            comparison = probe.compare_with(reloaded, {dtype})
    size = sum(_size(file) for file in out.glob("*.safetensors"))
    return Converted(out, rank, _size(folder / WEIGHTS_FILE), size, comparison)


class _Probe:
    """The logits of a model with and without its adapter, taken before it is converted."""

    def __init__(self, model: PeftModel) -> None:
        self.inputs = probe_inputs(model)
        with model.disable_adapter():
            self.base = logits(model, self.inputs)
        self.adapted = logits(model, self.inputs)

    def compare_with(self, converted: nn.Module, dtypes: set[torch.dtype]) -> Comparison:
        """Raise if the converted model answers differently."""
        return compare(self.base, self.adapted, logits(converted, self.inputs), dtypes)


def lora_of(
    model: Any,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype = torch.float32,
    pad_to: Literal["none", "pow2"] = "none",
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
    rank = max(layer.borrowed[adapter_name].rank for layer in layers.values())
    if pad_to == "pow2":
        rank = 1 << (rank - 1).bit_length()
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        tensors |= _layer_tensors(layer, adapter_name, f"{_WRAPPED}{path}", rank, dtype)
    return tensors, _lora_config(root, peft_config, layers, rank)


def _layer_tensors(
    layer: Any, adapter_name: str, name: str, rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    borrowed = layer.borrowed[adapter_name]
    with torch.no_grad():
        a, b = (
            assembled.stacked([factor().float().cpu() for factor in assembled.factors])
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
        magnitude = layer.lora_magnitude_vector[adapter_name].weight.detach().cpu()
        tensors[f"{name}.lora_magnitude_vector"] = magnitude.to(dtype).clone()
    return tensors


def _padded(a: Tensor, b: Tensor, rank: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Zero rows of A and columns of B up to `rank` (of each expert)."""
    missing = rank - a.shape[0] // blocks
    if not missing:
        return a, b
    rest = a.shape[1:]
    rows = torch.zeros(blocks, missing, *rest)
    a = torch.cat([a.reshape(blocks, -1, *rest), rows], dim=1).flatten(0, 1)
    columns = torch.zeros(b.shape[0], missing * blocks, *b.shape[2:])
    return a, torch.cat([b, columns], dim=1)


def _lora_config(
    root: nn.Module, config: Any, layers: Mapping[str, Any], rank: int
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
        "target_modules": _target_modules(root, config),
        "fan_in_fan_out": any(
            getattr(layer, "fan_in_fan_out", False) and not len(layer.lora_embedding_A)
            for layer in layers.values()
        ),
        "bias": "lora_only" if config.bias == "msplora_only" else config.bias,
        "modules_to_save": sorted(config.modules_to_save) if config.modules_to_save else None,
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


def _target_modules(root: nn.Module, config: Any) -> list[str]:
    """The names of the adapted modules' last parts, where those select just these modules."""
    sites = {
        path.removesuffix(".base_layer.out_proj")
        for path, module in root.named_modules()
        if isinstance(module, PyramidLayer) and type(module).__name__ != "ParamWrapper"
    }
    sites = {path for path in sites if ".base_layer" not in path}
    leaves = sorted({path.rpartition(".")[2] for path in sites})
    selected = {
        path
        for path, _ in root.named_modules()
        if not path.startswith(STORE_NAME)
        and ".base_layer" not in path
        and path.rpartition(".")[2] in leaves
    }
    return leaves if selected == sites else sorted(sites)


def _load_pyramid(folder: Path, base: BaseOptions | None) -> PeftModel:
    config = read_config(folder)
    if not isinstance(config, MSPLoraConfig):
        raise ConfigError(
            f"{str(folder)!r} is a {config.peft_type} adapter, not MSPLoRA; there is nothing to "
            f"convert."
        )
    return load_adapted(folder, base)


def _other_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter's file holds besides pairs: a head, biases, trained tokens."""
    return {key: tensor for key, tensor in tensors.items() if f"{STORE_NAME}." not in key}


def _ranks(model: Any) -> list[int]:
    config = next(iter(model.peft_config.values()))
    return list(getattr(config, "ranks", None) or [config.r])


def _copy_tokenizer(source: Path, out: Path) -> None:
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            if not (out / file.name).exists():
                shutil.copy2(file, out / file.name)


def _size(file: Path) -> int:
    return file.stat().st_size
