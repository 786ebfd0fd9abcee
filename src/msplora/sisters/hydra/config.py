"""What the user asks for: `HydraConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from msplora import _peft
from msplora.errors import ConfigError
from msplora.sisters.config import check_positive, check_whole, refuse_the_rest


class _Derived:
    """Marks a number that nobody gave. `dataclasses.replace` hands on all fields, and must not find
    one that was derived from the old ranks at odds with the new."""


class _DerivedRank(_Derived, int):
    pass


class _DerivedAlpha(_Derived, float):
    pass


@dataclass
class HydraConfig(LoraConfig):
    """Hydra: a low-rank branch on each layer's input and one on its output.

    ``y = z + scale (B_p A_p x + B_s A_s z)`` with ``z = W0 x + b0``. The paper adapts the output
    dense of the feed-forward blocks with ranks 4 and 8. `target_modules`, `exclude_modules`,
    `layers_to_transform`, `layers_pattern`, `modules_to_save` and `init_lora_weights` mean what
    they mean in PEFT's `LoraConfig`; `lora_dropout` drops between the two factors of a branch, as
    the released code does. Everything else of LoRA's is refused.

    Raises:
        ConfigError: the fields contradict each other.
        UnsupportedError: a feature of LoRA that Hydra does not have.
    """

    r_parallel: int = field(
        default=4, metadata={"help": "Rank of the branch on the layer's input."}
    )
    r_sequential: int = field(
        default=8, metadata={"help": "Rank of the branch on the layer's output."}
    )
    scale: float = field(default=1.0, metadata={"help": "What both branches are multiplied by."})
    branch_bias: bool = field(
        default=False, metadata={"help": "Give all four factors of a layer a bias that trains."}
    )
    r: int | None = field(  # pyright: ignore[reportAssignmentType]
        default=None, metadata={"help": "The sum of the two ranks; leave it out."}
    )
    lora_alpha: float | None = field(  # pyright: ignore[reportAssignmentType]
        default=None, metadata={"help": "scale times r; leave it out."}
    )

    def __post_init__(self) -> None:
        check_whole("r_parallel", self.r_parallel)
        check_whole("r_sequential", self.r_sequential)
        check_positive("scale", self.scale)
        rank = self.r_parallel + self.r_sequential
        derived = {"r": _DerivedRank(rank), "lora_alpha": _DerivedAlpha(self.scale * rank)}
        for name, meant in derived.items():
            found = getattr(self, name)
            if found not in (None, meant) and not isinstance(found, _Derived):
                raise ConfigError(
                    f"{name} = {found!r}: Hydra's ranks are r_parallel and r_sequential, and its "
                    f"factor is scale. Leave {name} out."
                )
            setattr(self, name, meant)
        refuse_the_rest(self, "Hydra")
        super().__post_init__()
        self.peft_type = _peft.register_type("hydra")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, which any writer of JSON or YAML takes."""
        fields = super().to_dict()
        return fields | {"r": int(fields["r"]), "lora_alpha": float(fields["lora_alpha"])}
