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
    one_place: str | None = None
    """Why `fsdp2` and `device_map`, which take layers apart, are not for it."""
    ranks_change: bool = False
    """Its layers have other ranks at the end than at the start."""
    note: str | None = None
    """What a run says of it before it begins."""
    own: Mapping[str, str] = field(default_factory=dict)
    """Its own section's key -> what its config calls it, where that differs."""


_SHAPES = "it changes what trains from step to step, which processes cannot agree on here"
_AT_THE_START = (
    "its ranks change while it trains: the numbers are those at the start, and the model card has "
    "those of the saved adapter too"
)

METHODS = {
    "hydra": PeftMethod("HydraConfig", _AS_LORA, quantises=True, merges=True),
    "elalora": PeftMethod(
        "ElaLoraConfig",
        {**_AS_LORA, "r": "r", "lora_alpha": "lora_alpha"},
        quantises=True,
        merges=True,
        one_process=_SHAPES,
        ranks_change=True,
        note=_AT_THE_START,
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
        ranks_change=True,
        note=_AT_THE_START,
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
        one_place="the same trained parts stand in several of its layers",
        note="it mixes its B for a whole batch, padding included: what a row is answered depends "
        "on the rows beside it, and so do the results on training.eval_batch_size",
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
    _check_devices(settings, found, source)
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


def _check_devices(settings: Settings, found: PeftMethod, source: str) -> None:
    devices, method = settings.devices, settings.method
    if devices.processes > 1 and found.one_process:
        raise ConfigError(
            f"in {source}: method {method!r} trains in one process: {found.one_process}. Set "
            f"devices.processes to 1."
        )
    if not found.one_place:
        return
    if devices.processes > 1 and devices.strategy == "fsdp2":
        raise ConfigError(
            f"in {source}: devices.strategy = 'fsdp2' shards layer by layer, and method {method!r} "
            f"cannot be taken apart: {found.one_place}. Use strategy ddp."
        )
    if devices.device_map:
        raise ConfigError(
            f"in {source}: devices.device_map = {devices.device_map!r} spreads the layers, and "
            f"method {method!r} cannot be taken apart: {found.one_place}. Leave it out."
        )


def check_one_process(method: str, processes: int) -> None:
    """Refuse to train in several processes, whatever started them, what takes one.

    Raises:
        ConfigError: there are several, and it does.
    """
    found = METHODS.get(method)
    if found and found.one_process and processes > 1:
        raise ConfigError(
            f"method {method!r} trains in one process: {found.one_process}, and {processes} train "
            f"here. Start the run by `msplora train` without a launcher, or let the launcher start "
            f"one process."
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


def ranks_change(method: str) -> bool:
    """Whether a method's layers have other ranks at the end than at the start."""
    return method in METHODS and METHODS[method].ranks_change


def has_adapter(method: str) -> bool:
    """Whether a method trains an adapter."""
    return method not in WITHOUT_ADAPTER


def is_lora(method: str) -> bool:
    """Whether PEFT's `LoraConfig` is the method's."""
    return method in LORAS
