"""Put a run's method on its base model: pyramid, plain LoRA, everything, or the head only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

import msplora
from msplora.errors import ConfigError, MSPLoraError, TargetError, nearest
from msplora.loading import read_config
from msplora.matching import check_names, own_modules
from msplora.sisters.elalora.moving import check_ranks_can_move

from .adalora import freeze_rank_numbers, is_adalora, leave_penalty_out
from .base_model import Base, encoder_of
from .init_from import notes_on_start, start_folder
from .levels import check_level_names, check_some_train, freeze_levels
from .peft_methods import METHODS, config_of, is_lora, keys_read, rank_of, unread_sections
from .saved_adapter import load_adapter, on_meta, to_float32
from .settings import LEVEL_KEYS, PYRAMID_KEYS, AdapterSettings, Settings
from .settings_methods import LORAS

Config = TypeVar("Config")

_TASK_TYPES = {True: peft.TaskType.SEQ_CLS, False: peft.TaskType.CAUSAL_LM}
"""By whether the model classifies."""

WITHOUT_B = ("full", "frozen", "adalora", "vera", "randlora", "lily")
"""The methods without factors that `training.b_learning_rate_factor` could tell apart."""


@dataclass(frozen=True)
class Trainable:
    """How many numbers train, and of what. `lora` is what plain LoRA of rank r would train."""

    adapter: int
    head: int
    base: int
    lora: int | None = None

    @property
    def total(self) -> int:
        """All numbers that train."""
        return self.adapter + self.head


@dataclass
class Adapted:
    """A model with its method applied, the plan of its pyramid, and what there is to say."""

    model: Any
    trainable: Trainable
    plan: msplora.Plan | None
    rank: int | None
    notes: list[str]


def adapt(base: Base, settings: Settings) -> Adapted:
    """Apply the method: after this, exactly what should train has `requires_grad`."""
    if settings.method in ("full", "frozen"):
        return _without_adapter(base, settings)
    config = adapter_config(settings, base)
    notes = _inapplicable(settings) + _said_of(settings.method)
    folder = start_folder(settings)
    if folder:
        config = _config_to_start_from(folder, base, settings, config)
        notes += notes_on_start(settings, base.model, base.tokenizer)
    plan = None
    if isinstance(config, msplora.MSPLoraConfig):
        plan = msplora.plan(base.model, config)
    base_numbers = base.model.num_parameters()  # two of 4 bits are one number in memory
    if settings.method == "vera" and on_meta(base.model):
        raise ConfigError(
            "PEFT cannot put VeRA on a model without weights, which a dry run has. Start the run."
        )
    if folder:
        model = load_adapter(base.model, folder, is_trainable=True)
    else:
        modules = dict(own_modules(base.model))
        try:
            model = peft.get_peft_model(base.model, config, low_cpu_mem_usage=on_meta(base.model))
        except ValueError as error:
            raise _explain(error, base.model, config, settings.method) from error
        if plan is None:  # a plan has looked for all that its config names
            # Only now: for experts that transformers fused, PEFT has put the names they have here.
            check_names(modules, model.peft_config["default"])
    if settings.method == "elalora":
        check_ranks_can_move(model)
    if is_adalora(model):
        leave_penalty_out(model)
        freeze_rank_numbers(model)
    to_float32(model)
    if plan:
        freeze_levels(model, settings.training.frozen_levels or ())
    head = _count(model, modules_to_save=True)
    adapter = _count(model) - head
    rank = sum(config.ranks or ()) if plan else rank_of(config)
    lora = plan.lora_parameters if plan else adapter if is_lora(settings.method) else None
    return Adapted(model, Trainable(adapter, head, base_numbers, lora), plan, rank, notes)


def check_levels(settings: Settings) -> None:
    """Refuse levels that the run's pyramid does not have, before its base is loaded.

    Raises:
        ConfigError: a key of `training` names one, or freezes all there are.
    """
    training = settings.training
    frozen = training.frozen_levels or ()
    staged = [level for stage in training.stages or () for level in stage.levels]
    factors = training.level_learning_rate_factors
    if settings.method != "msplora" or not (frozen or staged or factors):
        return
    folder = start_folder(settings)
    config = read_config(folder) if folder else _explained(pyramid_of, settings)
    if not isinstance(config, msplora.MSPLoraConfig):
        return  # an adapter of another method, which is refused when it is put on its base
    levels = config.levels or ()
    check_level_names(staged, levels, "training.stages")
    check_level_names(factors, levels, "training.level_learning_rate_factors")
    check_level_names(frozen, levels, "training.frozen_levels")
    check_some_train(frozen, levels)


def pyramid_of(settings: Settings) -> msplora.MSPLoraConfig:
    """The pyramid alone, without what a base has to be looked at for."""
    given = settings.adapter.model_dump(include={"r", "lora_alpha", *PYRAMID_KEYS})
    return msplora.MSPLoraConfig(**{key: its for key, its in given.items() if its is not None})


def adapter_config(settings: Settings, base: Base) -> Any:
    """Return the PEFT config of the run: the adapter's settings, and the head's modules.

    Raises:
        ConfigError: PEFT, or the pyramid, does not know what to do with the settings together.
    """
    return _explained(_config_of, settings, base)


def _explained(make: Callable[..., Config], *given: Any) -> Config:
    """Make a config; what PEFT says of it is about the adapter's section."""
    try:
        return make(*given)
    except MSPLoraError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"adapter: {error}") from error


def _config_of(settings: Settings, base: Base) -> Any:
    images = settings.task == "image-classification"
    common = {
        # PEFT has no type for images, and then keeps the model's class.
        "task_type": None if images else _TASK_TYPES[settings.classifies],
        "modules_to_save": [*base.head, *(settings.adapter.modules_to_save or [])] or None,
        "revision": settings.revision,
    }
    given = {
        key: value
        for key, value in settings.adapter.model_dump(exclude={"modules_to_save"}).items()
        if value is not None
    }
    if images and given.get("target_modules") == "all-linear":
        # PEFT leaves out the head of a model for texts only.
        if settings.method in METHODS and "exclude_modules" not in keys_read(settings.method):
            raise ConfigError(
                f"adapter.target_modules = 'all-linear' would adapt the head of a model for images "
                f"too, and method {settings.method!r} cannot leave it out. Name the modules."
            )
        given["exclude_modules"] = _with_head(given.get("exclude_modules"), base)
    if settings.method == "msplora":
        return msplora.MSPLoraConfig(**given, **common)
    if not is_lora(settings.method):
        given["r"], given["lora_alpha"] = lora_rank_and_alpha(settings.adapter)
        return config_of(settings, given, common)
    ours = {key: value for key, value in given.items() if key not in PYRAMID_KEYS}
    ours["r"], ours["lora_alpha"] = lora_rank_and_alpha(settings.adapter)
    if ours["bias"] == "msplora_only":
        ours["bias"] = "lora_only"
    if settings.method == "dora":
        ours["use_dora"] = True
    if settings.method == "rslora":
        ours["use_rslora"] = True
    return peft.LoraConfig(**ours, **common)


def _with_head(excluded: list[str] | str | None, base: Base) -> list[str] | str:
    """What `adapter.exclude_modules` leaves alone, and the head too."""
    if isinstance(excluded, str):
        return "|".join([f"({excluded})", *(rf"(.*\.)?{name}(\..*)?" for name in base.head)])
    within = [
        name
        for head in base.head
        for name, _ in base.model.get_submodule(head).named_modules(prefix=head)
    ]
    return [*(excluded or []), *within]


def lora_rank_and_alpha(adapter: AdapterSettings) -> tuple[int, float]:
    """The plain LoRA to compare with: of the first level's rank and alpha."""
    rank = adapter.r or (adapter.ranks[0] if adapter.ranks else 8)
    if adapter.lora_alpha is not None:
        return rank, adapter.lora_alpha
    if not adapter.alphas:
        return rank, 16
    return rank, sum(adapter.alphas) if adapter.split_alpha else adapter.alphas[0]


def _inapplicable(settings: Settings) -> list[str]:
    """One line naming the keys that this method does not read; comparing runs must not fail."""
    unread: dict[str, tuple[str, ...]] = {"adapter": (), "training": ()}
    if settings.method != "msplora":
        unread = {"adapter": PYRAMID_KEYS, "training": LEVEL_KEYS}
    if settings.method not in ("msplora", *LORAS):
        reads = keys_read(settings.method)
        # The rank and alpha of LoRA, which they are compared with, may be those of the pyramid.
        reads |= {"ranks", "alphas", "split_alpha"} if "r" in reads else set()
        unread["adapter"] = tuple(its for its in AdapterSettings.model_fields if its not in reads)
    if settings.method in WITHOUT_B:
        unread["training"] = (*LEVEL_KEYS, "b_learning_rate_factor")
    keys = [*unread_sections(settings)] + [
        f"{section}.{name}"
        for section, names in unread.items()
        for name in names
        if getattr(getattr(settings, section), name) != _default(section, name)
    ]
    return [f"method {settings.method} does not read {', '.join(keys)}"] if keys else []


def _said_of(method: str) -> list[str]:
    note = METHODS[method].note if method in METHODS else None
    return [f"method {method}: {note}"] if note else []


def _default(section: str, key: str) -> Any:
    field = Settings.model_fields[section].annotation.model_fields[key]  # pyright: ignore
    return field.get_default(call_default_factory=True)


def _without_adapter(base: Base, settings: Settings) -> Adapted:
    base_numbers = base.model.num_parameters()
    if settings.method == "full":
        base.model.requires_grad_(True)
        trainable = Trainable(base_numbers, 0, base_numbers)
    else:
        base.model.requires_grad_(False)
        for name in base.head:
            base.model.get_submodule(name).requires_grad_(True)
        trainable = Trainable(0, _count(base.model), base_numbers)
    return Adapted(base.model, trainable, None, None, _inapplicable(settings))


def refuse_adapted_output(model: Any, task: str) -> None:
    """Refuse an adapter of the output layer, whose weight the trainer multiplies by itself.

    Raises:
        ConfigError: there is one.
    """
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ConfigError(
            f"adapter.target_modules names the output layer, which task {task} reads past its "
            f"adapter. Leave it out."
        )


def _config_to_start_from(folder: Path, base: Base, settings: Settings, config: Any) -> Any:
    """The config of the adapter in `folder`, refused where the run's own asks for another."""
    found = read_config(folder)
    if found.peft_type != config.peft_type:
        raise ConfigError(
            f"init_from {folder} is a {str(found.peft_type).rpartition('.')[2]} adapter, but the "
            f"method is {settings.method!r}. Set method to match, or start from another adapter."
        )
    for key, method in (("use_dora", "dora"), ("use_rslora", "rslora")):
        its, asked = bool(getattr(found, key)), bool(getattr(config, key))
        if is_lora(settings.method) and its != asked:
            raise ConfigError(
                f"init_from {folder} was trained with {key} = {str(its).lower()}, and method "
                f"{settings.method!r} has {str(asked).lower()}. Use method "
                f"{method if its else 'lora'}, or start from another adapter."
            )
    untrained = sorted(set(config.modules_to_save or ()) - set(found.modules_to_save or ()))
    if untrained:
        raise ConfigError(
            f"init_from {folder} trains {', '.join(sorted(found.modules_to_save or ())) or 'none'} "
            f"in full beside the adapter, and the run {', '.join(untrained)} too "
            f"(adapter.modules_to_save, and a classifier's head). The adapter decides: leave out "
            f"of adapter.modules_to_save what is not in it, or start from another adapter."
        )
    default = AdapterSettings()  # pyright: ignore[reportCallIssue]
    unlike = [
        name
        for name in AdapterSettings.model_fields
        if name not in ("init_lora_weights", "modules_to_save")  # one is done, the other checked
        and getattr(settings.adapter, name) != getattr(default, name)
        and not _alike(name, getattr(found, name, None), getattr(config, name, None), base)
    ]
    if unlike:
        told = "; ".join(
            f"adapter.{name} is {_plain(getattr(config, name, None))!r} and the adapter's "
            f"{_plain(getattr(found, name, None))!r}"
            for name in unlike
        )
        raise ConfigError(
            f"init_from {folder}: {told}. The adapter decides these: leave the keys out, or start "
            f"from another adapter."
        )
    return found


def _alike(name: str, found: Any, wanted: Any, base: Base) -> bool:
    if name == "target_modules" and wanted == "all-linear" and not isinstance(found, str):
        # Saved adapters list what "all-linear" was.
        there = {target.rpartition(".")[2] for target in found or ()}
        encoder = base.model.get_submodule(encoder_of(base.model))
        return there >= set(_linear_names(encoder))
    return _plain(found) == _plain(wanted)


def _linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of linear layers, each once."""
    return list(
        dict.fromkeys(
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
        )
    )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, list, tuple)) else value


def _count(model: nn.Module, modules_to_save: bool = False) -> int:
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (not modules_to_save or ".modules_to_save." in name)
    )


def _explain(error: ValueError, model: nn.Module, config: Any, method: str) -> Exception:
    """PEFT names what it did not find, not what there is; our own errors say it already."""
    if isinstance(error, MSPLoraError):
        return error
    if not str(error).startswith(("Target modules", "No modules were targeted", "Please specify")):
        return ConfigError(f"method {method!r} cannot be put on {type(model).__name__}: {error}")
    leaves = _linear_names(model)
    wanted = config.target_modules
    names = [wanted] if isinstance(wanted, str) else sorted(wanted or ())
    hints = "".join(nearest(name, leaves, count=1) for name in names if name not in leaves)
    return TargetError(
        f"adapter.target_modules = {names or 'unset'} matches nothing in "
        f"{type(model).__name__}.{hints} It has: {', '.join(leaves)}."
    )
