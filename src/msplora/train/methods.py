"""Put a run's method on its base model: pyramid, plain LoRA, everything, or the head only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from torch import nn
from transformers.pytorch_utils import Conv1D

import msplora
from msplora.errors import ConfigError, TargetError, nearest
from msplora.loading import adapter_folder

from .base_model import Base
from .settings import PYRAMID_KEYS, AdapterSettings, Settings


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
    plan = None
    if isinstance(config, msplora.MSPLoraConfig):
        plan = msplora.plan(base.model, config)
    base_numbers = sum(parameter.numel() for parameter in base.model.parameters())
    notes = _inapplicable(settings)
    if settings.init_from:
        model = _from_adapter(base, settings, config)
        notes.append(f"started from the adapter {settings.init_from}")
    else:
        try:
            model = peft.get_peft_model(base.model, config)
        except ValueError as error:
            raise _explain(error, base.model, config) from error
    head = _count(model, modules_to_save=True)
    adapter = _count(model) - head
    rank = sum(config.ranks) if plan and config.ranks else config.r
    lora = plan.lora_parameters if plan else adapter
    return Adapted(model, Trainable(adapter, head, base_numbers, lora), plan, rank, notes)


def adapter_config(settings: Settings, base: Base) -> Any:
    """Return the PEFT config of the run: the adapter's settings, and the head's modules."""
    classifies = settings.task == "classification"
    common = {
        "task_type": peft.TaskType.SEQ_CLS if classifies else peft.TaskType.CAUSAL_LM,
        "modules_to_save": [*base.head, *(settings.adapter.modules_to_save or [])] or None,
        "revision": settings.revision,
    }
    given = {
        key: value
        for key, value in settings.adapter.model_dump(exclude={"modules_to_save"}).items()
        if value is not None
    }
    if settings.method == "msplora":
        return msplora.MSPLoraConfig(**given, **common)
    ours = {key: value for key, value in given.items() if key not in PYRAMID_KEYS}
    ours["r"], ours["lora_alpha"] = _lora_rank_and_alpha(settings.adapter)
    if ours["bias"] == "msplora_only":
        ours["bias"] = "lora_only"
    return peft.LoraConfig(**ours, **common)


def _lora_rank_and_alpha(adapter: AdapterSettings) -> tuple[int, float]:
    """The plain LoRA to compare with: of the first level's rank and alpha."""
    rank = adapter.r or (adapter.ranks[0] if adapter.ranks else 8)
    if adapter.lora_alpha is not None:
        return rank, adapter.lora_alpha
    if not adapter.alphas:
        return rank, 16
    return rank, sum(adapter.alphas) if adapter.split_alpha else adapter.alphas[0]


def _inapplicable(settings: Settings) -> list[str]:
    """One line naming the keys that this method does not read; comparing runs must not fail."""
    names = PYRAMID_KEYS if settings.method == "lora" else tuple(AdapterSettings.model_fields)
    if settings.method == "msplora":
        return []
    default = AdapterSettings()  # pyright: ignore[reportCallIssue]
    unread = [name for name in names if getattr(settings.adapter, name) != getattr(default, name)]
    if not unread:
        return []
    keys = ", ".join(f"adapter.{name}" for name in unread)
    return [f"method {settings.method} does not read {keys}"]


def _without_adapter(base: Base, settings: Settings) -> Adapted:
    base_numbers = sum(parameter.numel() for parameter in base.model.parameters())
    if settings.method == "full":
        base.model.requires_grad_(True)
        trainable = Trainable(base_numbers, 0, base_numbers)
    else:
        base.model.requires_grad_(False)
        for name in base.head:
            base.model.get_submodule(name).requires_grad_(True)
        trainable = Trainable(0, _count(base.model), base_numbers)
    return Adapted(base.model, trainable, None, None, _inapplicable(settings))


def _from_adapter(base: Base, settings: Settings, config: Any) -> Any:
    folder = adapter_folder(Path(settings.init_from or ""))
    found = peft.PeftConfig.from_pretrained(str(folder))
    if found.peft_type != config.peft_type:
        raise ConfigError(
            f"init_from {folder} is a {str(found.peft_type).rpartition('.')[2]} adapter, but the "
            f"method is {settings.method!r}. Set method to match, or start from another adapter."
        )
    unlike = [
        name
        for name in ("r", "ranks", "groups", "target_modules")
        if name in settings.adapter.model_fields_set
        and _plain(getattr(found, name, None)) != _plain(getattr(config, name, None))
    ]
    if unlike:
        raise ConfigError(
            f"init_from {folder} has another {' and '.join(unlike)} than the config asks for. The "
            f"adapter's shape comes from the folder: leave these keys out."
        )
    return peft.PeftModel.from_pretrained(base.model, str(folder), is_trainable=True)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, list, tuple)) else value


def _count(model: nn.Module, modules_to_save: bool = False) -> int:
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (not modules_to_save or ".modules_to_save." in name)
    )


def _explain(error: ValueError, model: nn.Module, config: Any) -> Exception:
    """PEFT names what it did not find, not what there is; our own errors say it already."""
    if not str(error).startswith(("Target modules", "No modules were targeted", "Please specify")):
        return error
    leaves = list(
        dict.fromkeys(
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
        )
    )
    wanted = config.target_modules
    names = [wanted] if isinstance(wanted, str) else sorted(wanted or ())
    hints = "".join(nearest(name, leaves, count=1) for name in names if name not in leaves)
    return TargetError(
        f"adapter.target_modules = {names or 'unset'} matches nothing in "
        f"{type(model).__name__}.{hints} It has: {', '.join(leaves)}."
    )
