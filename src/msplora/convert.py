"""Conversion, files to files: an MSPLoRA adapter to a plain LoRA, or into the base's weights.

The result is written beside its place, compared with the adapter on the real model, and put in
place only then.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import MSPLoraConfig
from .conversion_card import CARD_FILE, card_of_lora
from .errors import ConfigError, UnsupportedError
from .folders import check_apart, check_output, new_folder
from .foreseen import foresee
from .forms import PlainLora, Written, in_form
from .loading import (
    CONFIG_FILE,
    TASK_FILE,
    WEIGHTS_FILE,
    BaseOptions,
    adapter_folder,
    base_named_by,
    check_finite,
    dtype_argument,
    dtype_named,
    load_adapted,
    quiet_loading,
    read_config,
    read_tensors,
    write_json,
)
from .plain_lora import Padding, check_padding, lora_of
from .released import is_released, load_released
from .server_limits import asked_server, check_served
from .serving import GGUF_FILE, Form
from .store import STORE_NAME
from .verifying import Comparison, compare, logits, probe_inputs

# What goes along: the tokenizer, and what `msplora eval` and its kin must know of the task.
_COMPANIONS = (
    TASK_FILE,
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template.*",
    "preprocessor_config.json",
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
    base: str | None = None
    """The base model's path or hub id."""
    generates: bool = False
    """Whether it is a language model, which LoRA servers take."""


def to_lora(
    source: str | Path,
    out: str | Path,
    *,
    base: BaseOptions | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    pad_to: Padding = "none",
    server: str | None = None,
    max_lora_rank: int | None = None,
    form: Form = "lora",
    verify: bool = True,
    force: bool = False,
) -> Converted:
    """Write an MSPLoRA adapter as a plain LoRA that PEFT and every LoRA server reads.

    Args:
        source: the adapter's folder, or a run's.
        out: the folder to write.
        base: how to load the base model; the adapter names it.
        dtype: of the tensors written.
        pad_to: "pow2" pads the rank with zeros to a power of two, a number to that rank.
        server: refuse what this one of `serving.SERVERS` cannot serve.
        max_lora_rank: the largest rank that the server is started for, if it has such a flag.
        form: "gguf" writes llama.cpp's file and "mlx" mlx-lm's folder, in place of PEFT's.
        verify: load base and result with PEFT and compare the logits before anything is written.
        force: replace `out` if it is an earlier conversion, as it was written.

    Raises:
        MSPLoraError: the adapter or its base cannot be read, or the result is not the same.
    """
    if form not in (forms := get_args(Form)):
        raise ConfigError(f"no form {form!r} of a LoRA; there are {', '.join(forms)}.")
    asked = asked_server(server, form, max_lora_rank)
    check_padding(pad_to)
    stored = dtype_named(dtype)
    folder, out = adapter_folder(Path(source)), Path(out).expanduser()
    check_apart(out, folders_read(folder, base))
    check_output(out, force)
    if out.suffix == ".gguf":
        raise ConfigError(
            f"the output {str(out)!r} is a folder, in which the file is {GGUF_FILE}; give a "
            f"folder's name."
        )
    options = base or BaseOptions()
    if not is_released(folder):
        foresee(
            _pyramid_in(folder, form),
            options,
            form=form,
            pad_to=pad_to,
            server=asked,
            max_lora_rank=max_lora_rank,
        )
    model, others = _load_pyramid(folder, base)
    tensors, config = lora_of(model, dtype=stored, pad_to=pad_to)
    if asked is not None:
        check_served(model, asked, config["r"], max_lora_rank)
    own: Any = next(iter(model.peft_config.values()))
    config["base_model_name_or_path"], config["revision"] = options.recorded_for(own)
    tensors |= others
    check_finite(tensors, f"the LoRA in {dtype}")
    root: Any = model.get_base_model()
    written = in_form(form, PlainLora(tensors, config, root.config))
    with new_folder(out, force, made_from=folder.name) as partial:
        written.write(partial)
        if form == "lora":
            (partial / CARD_FILE).write_text(card_of_lora(config, folder.name), encoding="utf-8")
            copy_companions(folder, partial)
        comparison = None
        if verify:
            probe = _Probe(model)
            base_model: Any = model.unload()
            converted = _with_lora(base_model, written, partial, config)
            dtypes = {base_model.dtype, stored}
            comparison = probe.compare_with(converted, dtypes)
    return Converted(
        out,
        config["r"],
        _size_of_adapter(folder),
        _size(out / written.weights_file),
        comparison,
        base=config["base_model_name_or_path"],
        generates=config["task_type"] == "CAUSAL_LM",
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
        force: replace `out` if it is an earlier conversion, as it was written.

    Raises:
        MSPLoraError: the adapter or its base cannot be read, or the result is not the same.
    """
    folder, out = adapter_folder(Path(source)), Path(out).expanduser()
    check_apart(out, folders_read(folder, base))
    check_output(out, force)
    _check_merges(folder)
    model = load_released(folder, base)[0] if is_released(folder) else load_adapted(folder, base)
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
    model_class = type(merged)
    with new_folder(out, force, made_from=folder.name) as partial:
        with quiet_loading():
            merged.save_pretrained(partial)
        copy_companions(folder, partial)
        comparison = None
        del model, base_model, merged  # so that the reloaded model is not a second one in memory
        if probe is not None:
            with quiet_loading():
                options = {dtype_argument(): dtype}
                reloaded = model_class.from_pretrained(partial, **options).eval()
            comparison = probe.compare_with(reloaded, {dtype})
    size = sum(_size(file) for file in out.glob("*.safetensors"))
    return Converted(out, rank, _size_of_adapter(folder), size, comparison)


def _check_merges(folder: Path) -> None:
    """Refuse methods that PEFT cannot merge beside a head that was trained in full."""
    if is_released(folder):
        return
    config = read_config(folder)
    if not isinstance(config, LoraConfig):
        kind = str(config.peft_type).rpartition(".")[2]
        raise UnsupportedError(
            f"{str(folder)!r} is a {kind} adapter; --to merged takes those of MSPLoRA and LoRA, "
            f"and of Hydra, ElaLoRA and AdaLoRA. Use it through PEFT, unmerged."
        )


def _with_lora(base: Any, written: Written, folder: Path, config: dict[str, Any]) -> nn.Module:
    """The base with the LoRA that the written files hold, loaded by PEFT."""
    with tempfile.TemporaryDirectory() as scratch:
        if (folder / WEIGHTS_FILE).is_file():
            return PeftModel.from_pretrained(base, str(folder)).eval()
        save_file(written.read(folder), Path(scratch) / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(Path(scratch) / CONFIG_FILE, config)
        return PeftModel.from_pretrained(base, scratch).eval()


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


def folders_read(folder: Path, base: BaseOptions | None) -> list[Path]:
    """The folders a conversion reads, which its output must not replace."""
    source = (base.source if base else None) or base_named_by(folder)
    place = Path(source).expanduser() if source else folder
    return [folder, *([place] if place.is_dir() else [])]


def _load_pyramid(folder: Path, base: BaseOptions | None) -> tuple[PeftModel, dict[str, Tensor]]:
    """The adapted model, and what the adapter's file holds besides pairs."""
    if is_released(folder):
        return load_released(folder, base)
    return load_adapted(folder, base), other_tensors(read_tensors(folder))


def _pyramid_in(folder: Path, form: Form) -> MSPLoraConfig:
    config: Any = read_config(folder)
    if isinstance(config, MSPLoraConfig):
        return config
    kind = str(config.peft_type).rpartition(".")[2]
    if kind != "LORA":
        way = "merge it: --to merged" if isinstance(config, LoraConfig) else "use it through PEFT"
        raise ConfigError(
            f"{str(folder)!r} is of type {kind}, and --to {form} takes MSPLoRA adapters; {way}."
        )
    if form == "lora":
        raise ConfigError(
            f"{str(folder)!r} is a plain LoRA already, which PEFT and the servers read as it is; "
            f"there is nothing to convert."
        )
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    raise ConfigError(
        f"{str(folder)!r} is a plain LoRA, and --to {form} takes a pyramid. Make it one with a "
        f"pair for each layer, which is the same: --to msplora --ranks {rank} --groups 0. Convert "
        f"that."
    )


def other_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter's file holds besides pairs: a head, biases, trained tokens."""
    return {key: tensor for key, tensor in tensors.items() if f"{STORE_NAME}." not in key}


def _ranks(model: Any) -> list[int]:
    config = next(iter(model.peft_config.values()))
    return list(getattr(config, "ranks", None) or [config.r])


def copy_companions(source: Path, out: Path) -> None:
    """Copy what belongs to an adapter besides its tensors and its config."""
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if not (out / file.name).exists():
                shutil.copy2(file, out / file.name)


def _size_of_adapter(folder: Path) -> int:
    return sum(_size(file) for file in folder.glob("adapter_model.*"))


def _size(file: Path) -> int:
    return file.stat().st_size
