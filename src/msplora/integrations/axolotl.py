"""Axolotl's `adapter: msplora`.

    plugins:
      - msplora.integrations.axolotl.MSPLoRAPlugin
    adapter: msplora
    lora_r: 8
    lora_alpha: 16
    lora_target_modules: [q_proj, v_proj]
    msplora:          # may be left out: the paper's pyramid
      split_alpha: true

Axolotl's own keys for LoRA (`lora_…`, `peft_…`) mean what they mean there.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin  # pyright: ignore[reportMissingImports]
from axolotl.loaders.adapter import load_lora  # pyright: ignore[reportMissingImports]
from peft import PeftModel, get_peft_model
from pydantic import BaseModel, ConfigDict

from msplora.errors import ConfigError

from .from_lora import pyramid_of

NAME = "msplora"
# What Axolotl does for `adapter: lora` and `qlora` alone, and would leave undone without a word,
# or do to a pyramid as if it were a LoRA.
_QUANTISES = ("load_in_4bit", "load_in_8bit", "gptq")
_REWRITES = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class Pyramid(BaseModel):
    """The block `msplora:` of the config: the fields that a pyramid has and a LoRA has not."""

    model_config = ConfigDict(extra="forbid")

    levels: list[str] | None = None
    ranks: list[int] | None = None
    groups: list[int] | None = None
    alphas: list[float] | None = None
    split_alpha: bool = False


class MSPLoRAArgs(BaseModel):
    """What the plug-in adds to Axolotl's config."""

    msplora: Pyramid | None = None


class MSPLoRAPlugin(BasePlugin):
    """Adapts the model with a pyramid where the config says `adapter: msplora`."""

    def get_input_args(self) -> str:
        """Where Axolotl finds the block's keys."""
        return f"{__name__}.{MSPLoRAArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The name of the adapter; Axolotl's code for LoRA is not to be used on it."""
        return [AdapterCapabilities(name=NAME, lora_like=False, relora=False)]

    def register(self, cfg: dict[str, Any]) -> None:
        """Refuse what would be ignored or go wrong, before a model is loaded.

        Raises:
            ConfigError: the reason.
        """
        if cfg.get("adapter") != NAME:
            return
        for key in _QUANTISES:
            if cfg.get(key):
                raise ConfigError(
                    f"{key}: Axolotl quantises the base for adapter: lora and qlora only. Leave it "
                    f"out, or train on a quantised base with `msplora train`."
                )
        for key in _REWRITES:
            if cfg.get(key):
                raise ConfigError(
                    f"{key}: Axolotl's kernels compute a LoRA's own two factors, which a pyramid's "
                    f"layers do not have. Leave it out."
                )
        if cfg.get("merge_lora") and cfg.get("merge_method") != "legacy":
            raise ConfigError(
                "axolotl merge-lora reads a LoRA's tensors from the file by default. Add "
                "merge_method: legacy, or merge with `msplora convert ADAPTER OUT --to merged`."
            )

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, Any] | None:
        """Return the adapted model and its config; `None` where the config asks for another."""
        if cfg.adapter != NAME:
            return None
        asked = load_lora(model, cfg, config_only=True)[1]
        config = pyramid_of(asked, **dict(cfg.msplora or {}))
        if config_only:
            return None, config
        options: dict[str, Any] = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            adapted = PeftModel.from_pretrained(
                model, cfg.lora_model_dir, is_trainable=not inference, **options
            )
            return adapted, adapted.peft_config["default"]
        return get_peft_model(model, config, **options), config
