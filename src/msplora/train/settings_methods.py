"""What methods other than MSPLoRA and LoRA have of their own: a section each, by their names."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .settings_section import Section

Method = Literal[
    "msplora",
    "lora",
    "dora",
    "rslora",
    "hydra",
    "elalora",
    "gralora",
    "adalora",
    "vera",
    "randlora",
    "lily",
    "full",
    "frozen",
]

WITHOUT_ADAPTER = ("full", "frozen")
LORAS = ("lora", "dora", "rslora")
"""Plain LoRA, and the two that are LoRA with another scale or with magnitudes."""


class HydraSettings(Section):
    """Hydra: a branch on each layer's input and one on its output."""

    r_parallel: int = Field(4, ge=1, description="Rank of the branch on the layer's input.")
    r_sequential: int = Field(8, ge=1, description="Rank of the branch on the layer's output.")
    scale: float = Field(1.0, gt=0, description="What both branches are multiplied by.")
    branch_bias: bool = Field(False, description="Give all four factors of a layer a bias.")


class ElaLoraSettings(Section):
    """ElaLoRA: ranks move between layers while it trains."""

    prune_per_step: int = Field(4, ge=1, description="Ranks that move at once, at first.")
    pool_per_site: int = Field(
        2, ge=1, description="A layer's weakest ranks, which others' are compared with."
    )
    interval: int | None = Field(
        None, ge=1, description="Steps between two moves; 4 % of the run's if unset."
    )
    warmup_steps: int | None = Field(
        None, ge=0, description="Steps before ranks begin to move; a fifth of the run's if unset."
    )
    final_steps: int | None = Field(
        None, ge=0, description="Steps without moves at the end; a quarter of the run's if unset."
    )
    orthogonal_penalty: float = Field(
        0.1, ge=0, description="Weight of the penalty on factors that are not orthogonal."
    )


class GraLoraSettings(Section):
    """GraLoRA, PEFT's: a grid of blocks, each with its own pair."""

    gralora_k: int = Field(2, ge=1, description="Blocks per side; it divides `adapter.r`.")
    hybrid_r: int = Field(
        0, ge=0, description="Rank of a plain LoRA beside the blocks, besides `adapter.r`."
    )


class AdaLoraSettings(Section):
    """AdaLoRA, PEFT's: starts with more ranks than `adapter.r` and prunes them."""

    init_r: int | None = Field(
        None,
        ge=1,
        description="Rank of every layer at the start, above `adapter.r`; 1.5 times that if unset.",
    )
    tinit: int | None = Field(
        None, ge=0, description="Steps before pruning begins; a tenth of the run's if unset."
    )
    tfinal: int | None = Field(
        None, ge=0, description="Steps after it has ended; a half of the run's if unset."
    )
    deltaT: int | None = Field(
        None, ge=1, description="Steps between two prunings; 1 % of the run's if unset."
    )
    orth_reg_weight: float = Field(
        0.5, ge=0, description="Weight of the penalty on factors that are not orthogonal."
    )


class VeraSettings(Section):
    """VeRA, PEFT's: frozen random factors for all layers, and two vectors for each."""

    r: int = Field(256, ge=1, description="Rank of the random factors.")
    d_initial: float = Field(0.1, gt=0, description="Where the vector between them starts.")


class RandLoraSettings(Section):
    """RandLoRA, PEFT's: sums of frozen random bases, scaled by what trains."""

    r: int = Field(32, ge=1, description="Rank of one random basis; a larger one trains less.")
    alpha: float = Field(640, gt=0, description="Its alpha (`randlora_alpha`).")


class LilySettings(Section):
    """Lily, PEFT's: A shared by neighbouring layers, B mixed for each batch, padding included."""

    r: int = Field(32, ge=1, description="Rank.")
    stride_A: int = Field(1, ge=1, description="Neighbouring layers that share an A.")
    num_B: int = Field(2, ge=1, description="How many B are mixed.")
    scaling: float = Field(1.0, gt=0, description="What the sum is multiplied by.")


METHOD_SECTIONS: dict[str, type[Section]] = {
    "hydra": HydraSettings,
    "elalora": ElaLoraSettings,
    "gralora": GraLoraSettings,
    "adalora": AdaLoraSettings,
    "vera": VeraSettings,
    "randlora": RandLoraSettings,
    "lily": LilySettings,
}
"""Method -> its section, which has its name."""
