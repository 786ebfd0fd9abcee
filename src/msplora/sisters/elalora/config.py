"""What the user asks for: `ElaLoraConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from peft import LoraConfig

from msplora import _peft
from msplora.errors import ConfigError
from msplora.sisters.config import (
    COMMON,
    check_positive,
    check_whole,
    is_number,
    refuse_the_rest,
)


@dataclass
class ElaLoraConfig(LoraConfig):
    """ElaLoRA: adapters whose ranks move from layers that need them least to others in training.

    ``y = W0 x + s B diag(E) A x`` with ``s = lora_alpha / r``. Ranks move while `MoveRanks` is
    among the trainer's callbacks, or a `RankMover` is called in a loop of one's own; the sum over
    all layers stays what it was. `target_modules`, `exclude_modules`, `layers_to_transform`,
    `layers_pattern`, `modules_to_save`, `lora_dropout`, `init_lora_weights` and `rank_pattern` mean
    what they mean in PEFT's `LoraConfig`; everything else of LoRA's is refused.

    Raises:
        ConfigError: the fields contradict each other.
        UnsupportedError: a feature of LoRA that ElaLoRA does not have.
    """

    r: int = field(default=8, metadata={"help": "Rank of every layer at the start."})
    lora_alpha: float = field(  # pyright: ignore[reportAssignmentType]
        default=16, metadata={"help": "The scale is lora_alpha / r, however ranks move."}
    )
    prune_per_step: int = field(
        default=4, metadata={"help": "Ranks that move at once, at first (the paper's b)."}
    )
    pool_per_site: int = field(
        default=2,
        metadata={
            "help": "A layer's weakest ranks, which others' are compared with (the paper's k)."
        },
    )
    interval: int | None = field(
        default=None,
        metadata={"help": "Steps from one move to the next; 4 % of the run's if unset."},
    )
    warmup_steps: int | None = field(
        default=None,
        metadata={"help": "Steps before ranks begin to move; a fifth of the run's if unset."},
    )
    final_steps: int | None = field(
        default=None,
        metadata={"help": "Steps at the end in which none moves; a quarter of the run's if unset."},
    )
    orthogonal_penalty: float = field(
        default=0.1, metadata={"help": "Weight of the penalty on factors that are not orthogonal."}
    )
    beta1: float = field(
        default=0.85, metadata={"help": "Smoothing of the sensitivity, above 0 and below 1."}
    )
    beta2: float = field(
        default=0.85, metadata={"help": "Smoothing of its uncertainty, above 0 and below 1."}
    )

    def __post_init__(self) -> None:
        for name in ("r", "prune_per_step", "pool_per_site"):
            check_whole(name, getattr(self, name))
        for name, least in (("interval", 1), ("warmup_steps", 0), ("final_steps", 0)):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), least)
        check_positive("lora_alpha", self.lora_alpha)
        penalty = self.orthogonal_penalty
        if not is_number(penalty) or not math.isfinite(penalty) or penalty < 0:
            raise ConfigError(f"orthogonal_penalty = {penalty!r}: a finite number, 0 or above.")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < 1:
                raise ConfigError(f"{name} = {value!r}: a number above 0 and below 1.")
        for site, rank in (self.rank_pattern or {}).items():
            check_whole(f"rank_pattern[{site!r}]", rank)
        refuse_the_rest(self, "ElaLoRA", (*COMMON, "rank_pattern"))
        super().__post_init__()
        self.peft_type = _peft.register_type("elalora")
