"""The methods beside MSPLoRA and LoRA: which config is theirs, what it reads, what they cannot do.

Most are PEFT's, some of them only in newer releases; Hydra and ElaLoRA are `msplora.sisters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msplora.errors import ConfigError

from .settings import Settings
from .settings_methods import LORAS, METHOD_SECTIONS, WITHOUT_ADAPTER

_EVERYWHERE = {
    name: name
    for name in ("target_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
}
_AS_LORA = {
    **_EVERYWHERE,
    "exclude_modules": "exclude_modules",
    "lora_dropout": "lora_dropout",
    "init_lora_weights": "init_lora_weights",
}


@dataclass(frozen=True)
class PeftMethod:
    """One method. `reads` is the adapter's key -> what its config calls it."""

    config: str
    reads: Mapping[str, str]
    since: str | None = None
    """The release of PEFT that brought it, where older ones that msplora runs with lack it."""
    quantises: bool = False
    """`msplora train` takes it on a base in 4 or 8 bits."""
    merges: bool = False
    """`msplora convert --to merged` takes it."""
    one_process: str | None = None
    """Why it trains in one process only."""
    own: Mapping[str, str] = field(default_factory=dict)
    """Its own section's key -> what its config calls it, where that differs."""


_SHAPES = "it changes what trains from step to step, which processes cannot agree on here"

METHODS = {
    "hydra": PeftMethod("HydraConfig", _AS_LORA, quantises=True, merges=True),
    "elalora": PeftMethod(
        "ElaLoraConfig",
        {**_AS_LORA, "r": "r", "lora_alpha": "lora_alpha"},
        quantises=True,
        merges=True,
        one_process=_SHAPES,
    ),
    "gralora": PeftMethod(
        "GraloraConfig",
        {
            **_EVERYWHERE,
            "r": "r",
            "lora_alpha": "alpha",
            "lora_dropout": "gralora_dropout",
            "init_lora_weights": "init_weights",
        },
        since="0.19",
    ),
    "adalora": PeftMethod(
        "AdaLoraConfig",
        {**_AS_LORA, "r": "target_r", "lora_alpha": "lora_alpha"},
        merges=True,
        one_process=_SHAPES,
    ),
    "vera": PeftMethod(
        "VeraConfig",
        {**_EVERYWHERE, "lora_dropout": "vera_dropout", "init_lora_weights": "init_weights"},
    ),
    "randlora": PeftMethod(
        "RandLoraConfig",
        {**_EVERYWHERE, "lora_dropout": "randlora_dropout", "init_lora_weights": "init_weights"},
        own={"alpha": "randlora_alpha"},
    ),
    "lily": PeftMethod(
        "LilyConfig",
        {**_EVERYWHERE, "exclude_modules": "exclude_modules", "init_lora_weights": "init_weights"},
        since="0.19",
    ),
}
"""Method -> what it is; without msplora, LoRA's kinds, and those without an adapter."""

METHODS_IN_BITS = ("msplora", *LORAS, *(name for name, its in METHODS.items() if its.quantises))
"""The methods that train on a base in 4 or 8 bits here; PEFT has layers for it of others too."""


def check_method(settings: Settings, source: str) -> None:
    """Refuse what a run's method cannot do, before anything is loaded.

    Raises:
        ConfigError: there is something.
    """
    method = settings.method
    if settings.task == "dpo" and method == "adalora":
        raise ConfigError(
            f"in {source}: task 'dpo' keeps a second adapter at times, and AdaLoRA allows one. Use "
            f"another method."
        )
    found = METHODS.get(method)
    if found is None:
        return
    config_class(method)
    if settings.devices.processes > 1 and found.one_process:
        raise ConfigError(
            f"in {source}: method {method!r} trains in one process: {found.one_process}. Set "
            f"devices.processes to 1."
        )
    if settings.adapter.exclude_modules and "exclude_modules" not in found.reads:
        raise ConfigError(
            f"in {source}: PEFT's {method} cannot leave modules out (adapter.exclude_modules). "
            f"Name in adapter.target_modules only what is to be adapted."
        )
    training = settings.training
    if method == "elalora" and not training.optimizer.startswith(("adamw_torch", "sgd")):
        raise ConfigError(
            f"in {source}: training.optimizer = {training.optimizer!r} keeps what cannot follow "
            f"the ranks that ElaLoRA moves. Use adamw_torch, adamw_torch_fused or sgd."
        )


def config_class(method: str) -> Any:
    """The class of a method's config.

    Raises:
        ConfigError: the installed PEFT does not have it.
    """
    from msplora import sisters

    wanted = METHODS[method]
    if wanted.config in sisters.__all__:
        sisters.register()
        return getattr(sisters, wanted.config)
    import peft  # not above: settings are read, and recipes listed, without it

    found = getattr(peft, wanted.config, None)
    if found is None:
        raise ConfigError(
            f"method {method!r} is PEFT's from version {wanted.since} on, and PEFT "
            f"{peft.__version__} is installed. pip install -U peft, or use another method."
        )
    return found


def config_of(settings: Settings, given: Mapping[str, Any], common: Mapping[str, Any]) -> Any:
    """The config of a run's method.

    Args:
        settings: of the run.
        given: the adapter's keys that are set.
        common: what every PEFT config of a run gets.
    """
    method = METHODS[settings.method]
    values = {method.reads[key]: value for key, value in given.items() if key in method.reads}
    defaults = {"r": 8, "lora_alpha": 16}
    for key, default in defaults.items():
        if key in method.reads:
            values.setdefault(method.reads[key], default)
    section = getattr(settings, settings.method).model_dump()
    own = {method.own.get(key, key): its for key, its in section.items() if its is not None}
    if settings.method == "adalora":
        from .adalora import for_now

        own.update(for_now(values["target_r"], own))
    if settings.method in ("vera", "randlora"):
        own["projection_prng_key"] = settings.seed
    return config_class(settings.method)(**values, **own, **common)


def keys_read(method: str) -> set[str]:
    """The keys of `adapter` that such a method reads, of those that not all do."""
    return set(METHODS[method].reads) if method in METHODS else set()


def rank_of(config: Any) -> int:
    """The rank that a method's config asks for in every layer."""
    return getattr(config, "target_r", None) or config.r


def unread_sections(settings: Settings) -> list[str]:
    """The sections of other methods that say something."""
    return [
        name
        for name, section in METHOD_SECTIONS.items()
        if name != settings.method and getattr(settings, name) != section()
    ]


def has_adapter(method: str) -> bool:
    """Whether a method trains an adapter."""
    return method not in WITHOUT_ADAPTER


def is_lora(method: str) -> bool:
    """Whether PEFT's `LoraConfig` is the method's."""
    return method in LORAS
