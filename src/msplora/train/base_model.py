"""Load the base model and its tokenizer, and refuse one whose weights are not all there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn

from msplora.errors import BaseModelError, ConfigError
from msplora.loading import (
    dtype_argument,
    loading_errors_explained,
    mismatched_names,
    quiet_loading,
    resolve_source,
)

from .data_classification import Classes
from .init_from import kept_tokenizer
from .quantisation import is_quantised, prepare_quantised, quantisation_config
from .settings import Settings
from .weightless_quantised import quantise_without_weights


@dataclass
class Base:
    """A base model ready to be adapted, and its tokenizer (of images, their processor).

    `head` names the modules that train beside any adapter: a classifier's head, and a pooler that
    the checkpoint never had. They are float32; the rest has the dtype `arithmetic`.
    """

    model: Any
    tokenizer: Any
    arithmetic: torch.dtype
    head: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> str:
        """The name of the arithmetic, as the settings have it."""
        return str(self.arithmetic).removeprefix("torch.")


def load_tokenizer(settings: Settings) -> Any:
    """Load the tokenizer of the run, with a token to pad with.

    Of one that starts from an adapter it is the adapter's, its chat template included, where the
    settings do not name another: so the adapter goes on seeing what it was trained on.
    """
    source, revision = _source_of_tokenizer(settings, "tokenizer")
    with loading_errors_explained(source, "the tokenizer of"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=settings.trust_remote_code
        )
    if settings.data.chat_template:
        file = Path(settings.data.chat_template)
        if not file.is_file():
            raise ConfigError(f"data.chat_template: the file {file} does not exist.")
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"data.chat_template: {file} is not UTF-8 text ({error.reason} at byte "
                f"{error.start}). Convert it first."
            ) from None
    if tokenizer.pad_token is None:
        # Padding is masked in attention and in the loss, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_image_processor(settings: Settings) -> Any:
    """Load what turns the images of the run into the model's input."""
    source, revision = _source_of_tokenizer(settings, "image processor")
    with loading_errors_explained(source, "the image processor of"):
        return transformers.AutoImageProcessor.from_pretrained(
            source, revision=revision, trust_remote_code=settings.trust_remote_code
        )


def _source_of_tokenizer(settings: Settings, what: str) -> tuple[str, str | None]:
    """Where the tokenizer, or the processor of images, is, and the revision of it."""
    if settings.tokenizer:
        return resolve_source(settings.tokenizer, what), None
    kept = kept_tokenizer(settings)
    if kept:
        return str(kept), None
    return resolve_source(settings.model, what), settings.revision


def load_base(settings: Settings, classes: Classes | None, for_training: bool = True) -> Base:
    """Load the model of a run: a classifier where there are `classes`, else a causal model.

    Raises:
        BaseModelError: there is no such model, or some weights of its encoder are missing.
    """
    source = resolve_source(settings.model)
    of_images = settings.task == "image-classification"
    tokenizer = load_image_processor(settings) if of_images else load_tokenizer(settings)
    config, loader = config_and_class(settings, classes, source)
    arithmetic = _arithmetic(settings, config, on_gpu=torch.cuda.is_available())
    options: dict[str, Any] = {
        **hub_options(settings),
        "config": config,
        dtype_argument(): _weights_dtype(settings, arithmetic, for_training),
        # Where it is unset the model is loaded on the CPU, and the trainer moves it.
        **({"device_map": settings.devices.device_map} if settings.devices.device_map else {}),
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported below, and refused but in a head
    }
    whole = _head_of(loader, config, settings) if classes else ()
    quantised = quantisation_config(settings, config, arithmetic, whole)
    if quantised:
        options |= {"quantization_config": quantised, dtype_argument(): arithmetic}
    with loading_errors_explained(source), quiet_loading():
        model, loading = loader.from_pretrained(source, **options)
    if is_quantised(model):
        model = prepare_quantised(model)
    base = _base_of(model, tokenizer, arithmetic, classes)
    if is_quantised(model):
        base.notes.append(
            f"the base is quantised: {settings.quantization or 'as it was published'}"
        )
    _check_weights(base, loading, source)
    for name in base.head:
        model.get_submodule(name).float()
    return base


def base_without_weights(settings: Settings, classes: Classes | None, on_gpu: bool = False) -> Base:
    """The same model on the meta device: shapes without storage, from its config alone.

    Where the checkpoint is in a folder here, the names of its tensors say what would start from
    random numbers; elsewhere only the head is taken to be new.

    Args:
        settings: the run.
        classes: of a classifier.
        on_gpu: choose the arithmetic as on a GPU, whether there is one here or not.
    """
    source = resolve_source(settings.model)
    of_images = settings.task == "image-classification"
    tokenizer = load_image_processor(settings) if of_images else load_tokenizer(settings)
    config, loader = config_and_class(settings, classes, source)
    arithmetic = _arithmetic(settings, config, on_gpu)
    whole = _head_of(loader, config, settings) if classes else ()
    quantised = quantisation_config(settings, config, arithmetic, whole)
    quantised = quantised or getattr(config, "quantization_config", None)
    weights = arithmetic if quantised else _weights_dtype(settings, arithmetic, for_training=True)
    dtype = {dtype_argument(): weights}
    code = {"trust_remote_code": settings.trust_remote_code}
    with loading_errors_explained(source), quiet_loading(), torch.device("meta"):
        model = loader.from_config(config, **dtype, **code).eval()
        model.tie_weights()
        if quantised:
            quantise_without_weights(model, quantised, arithmetic)
            model = prepare_quantised(model)
    base = _base_of(model, tokenizer, arithmetic, classes)
    stored = _stored_names(source)
    poolers = {_pooler(name) for name, _ in model.named_parameters()} - {None}
    if classes and stored and not any(map(_pooler, stored)):
        base.head = (*base.head, *sorted(name for name in poolers if name))
    for name in base.head:
        model.get_submodule(name).float()
    return base


LoadBase = Callable[[Settings, Classes | None], Base]


def hub_options(settings: Settings) -> dict[str, Any]:
    return {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}


def config_and_class(settings: Settings, classes: Classes | None, source: str) -> tuple[Any, Any]:
    """The config of the model, with the classes written into it, and what loads it."""
    with loading_errors_explained(source):
        config = transformers.AutoConfig.from_pretrained(source, **hub_options(settings))
    if classes:
        loader: Any = (
            transformers.AutoModelForImageClassification
            if settings.task == "image-classification"
            else transformers.AutoModelForSequenceClassification
        )
        config.num_labels = classes.outputs
        if classes.labels:
            config.id2label = dict(enumerate(classes.labels))
            config.label2id = {label: place for place, label in enumerate(classes.labels)}
        config.problem_type = "regression" if classes.regression else "single_label_classification"
    else:
        loader = transformers.AutoModelForCausalLM
    return config, loader


def _weights_dtype(settings: Settings, arithmetic: torch.dtype, for_training: bool) -> torch.dtype:
    return torch.float32 if settings.method == "full" and for_training else arithmetic


def _base_of(model: Any, tokenizer: Any, arithmetic: torch.dtype, classes: Classes | None) -> Base:
    text = model.config.get_text_config()
    if hasattr(tokenizer, "pad_token_id") and getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = tokenizer.pad_token_id
    return Base(model, tokenizer, arithmetic, _head(model) if classes else ())


def _stored_names(source: str) -> list[str]:
    """The names of the tensors of a checkpoint in a folder, out of its headers."""
    names: list[str] = []
    for file in sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else ():
        with safe_open(file, framework="pt") as opened:
            names += opened.keys()
    return names


def _arithmetic(settings: Settings, config: Any, on_gpu: bool) -> torch.dtype:
    if settings.dtype != "auto":
        if settings.dtype == "float16" and not on_gpu:
            raise ConfigError("dtype 'float16' needs a GPU. Use bfloat16 or float32.")
        return getattr(torch, settings.dtype)
    stored = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    if stored not in (torch.bfloat16, torch.float16) or (stored == torch.float16 and not on_gpu):
        return torch.float32
    return stored


def encoder_of(model: Any) -> str:
    """The name of the child that the head reads: the one that the model's class calls its base.

    Some classes have no child of that name: CLIP's and SigLIP's classifiers of images hold one of
    the two towers under the name that it has beside the other. There it is the child that holds
    the input embeddings, or, of a model that does not say where those are, the largest one.
    """
    children = dict(model.named_children())
    if (prefix := getattr(model, "base_model_prefix", "")) in children:
        return prefix
    with suppress(AttributeError, NotImplementedError):
        embeddings = model.get_input_embeddings()
        for name, child in children.items():
            if any(its is embeddings for its in child.modules()):
                return name
    sizes = {name: sum(map(torch.numel, its.parameters())) for name, its in children.items()}
    return max(sizes, key=sizes.__getitem__, default="")


def _head(model: nn.Module) -> tuple[str, ...]:
    """The modules with weights that stand beside the encoder: classifier, score, pooler …"""
    encoder = encoder_of(model)
    return tuple(
        name
        for name, module in model.named_children()
        if name != encoder and any(True for _ in module.parameters())
    )


def _head_of(loader: Any, config: Any, settings: Settings) -> tuple[str, ...]:
    """The modules that stay whole: the head, and a pooler, which may turn out to be new."""
    if not settings.quantization:
        return ()
    with torch.device("meta"):
        model = loader.from_config(config, trust_remote_code=settings.trust_remote_code)
    return (*_head(model), *(name for name, _ in model.named_modules() if name.endswith("pooler")))


def _check_weights(base: Base, loading: dict[str, Any], source: str) -> None:
    """Refuse random encoder weights; note (and train) a head that the checkpoint never had."""
    fresh = sorted({*loading["missing_keys"], *mismatched_names(loading)})
    new, lost = [], []
    for name in fresh:
        module = _owner_in_head(name, base.head) or _pooler(name)
        (new if module else lost).append(module or name)
    if lost:
        shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        unused = sorted(loading["unexpected_keys"])[:3]
        hint = f" The checkpoint has unused weights, such as {', '.join(unused)}." if unused else ""
        raise BaseModelError(
            f"{source}: {len(lost)} weights of the base are missing or have another shape, and "
            f"would start from random numbers: {shown}.{hint} Use a checkpoint that fits the "
            f"model class {type(base.model).__name__}."
        )
    new = list(dict.fromkeys(new))
    if new:
        base.notes.append(f"new, starting from random numbers: {', '.join(new)}")
    loaded = [name for name in base.head if name not in new]
    if loaded:
        base.notes.append(f"head taken from the checkpoint: {', '.join(loaded)}")
    base.head = (*base.head, *(name for name in new if name not in base.head))


def _owner_in_head(parameter: str, head: tuple[str, ...]) -> str | None:
    return next((name for name in head if parameter.startswith(name + ".")), None)


def _pooler(parameter: str) -> str | None:
    """The pooler a parameter belongs to: checkpoints of language models often have none."""
    parts = parameter.split(".")
    return ".".join(parts[: parts.index("pooler") + 1]) if "pooler" in parts else None
