"""The configuration of a training run, typed: every key, its default and what it means.

The descriptions are the documentation: docs/training.md is checked against them by a test.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
)

from .settings_data import DataSettings
from .settings_methods import (
    METHOD_SECTIONS,
    AdaLoraSettings,
    ElaLoraSettings,
    GraLoraSettings,
    HydraSettings,
    LilySettings,
    Method,
    RandLoraSettings,
    VeraSettings,
)
from .settings_section import Section

Task = Literal["classification", "image-classification", "sft", "dpo"]
PreferenceLoss = Literal[
    "sigmoid", "ipo", "hinge", "sigmoid_norm", "apo_zero", "apo_down", "nca_pair", "bco_pair"
]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "clearml", "swanlab"]


class AdapterSettings(Section):
    """The adapter; what is unset is left to `MSPLoraConfig` or `LoraConfig`."""

    r: int | None = Field(None, ge=1, description="Rank: 8 if unset, or the first of `ranks`.")
    lora_alpha: float | None = Field(
        None, gt=0, description="Alpha of every level: 16 if unset, or the first of `alphas`."
    )
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout on the layer's input.")
    target_modules: list[str] | str | None = Field(
        None, description="Names, a regular expression, or `all-linear`; PEFT's choice if unset."
    )
    exclude_modules: list[str] | str | None = Field(
        None, description="Modules to leave alone although `target_modules` names them."
    )
    layers_to_transform: list[int] | int | None = Field(
        None, description="Adapt only these layers."
    )
    layers_pattern: list[str] | str | None = Field(
        None, description="Name of the list of layers that `layers_to_transform` counts in."
    )
    modules_to_save: list[str] | None = Field(
        None, description="Modules trained in full beside the adapter, besides a classifier's head."
    )
    bias: Literal["none", "all", "lora_only", "msplora_only"] = Field(
        "none", description="Which biases train."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / √r instead of alpha / r.")
    use_dora: bool = Field(False, description="Learn each layer's magnitude apart (DoRA).")
    init_lora_weights: bool = Field(True, description="False starts from random non-zero pairs.")
    levels: list[str] | None = Field(None, description="Names of the levels of the pyramid.")
    ranks: list[int] | None = Field(None, description="Rank of each level.")
    groups: list[int] | None = Field(
        None,
        description="Groups of each level: 1 = shared by all layers, k = k groups, 0 = per layer.",
    )
    alphas: list[float] | None = Field(None, description="Alpha of each level.")
    split_alpha: bool = Field(
        False,
        description="Share `lora_alpha` over the levels; a rate that LoRA stands is then safe.",
    )


PYRAMID_KEYS = ("levels", "ranks", "groups", "alphas", "split_alpha")
"""The adapter's keys that mean nothing to plain LoRA."""


class StageSettings(Section):
    """One stage of staged training; a name or a list of names stands for the levels alone."""

    levels: list[str] = Field(min_length=1, description="The levels that train in this stage.")
    share: float = Field(
        1.0, gt=0, description="How long it is, in proportion to the shares of the other stages."
    )


def _levels_alone(value: Any) -> Any:
    """`mid` and `[mid, local]` are stages as `{levels: [mid]}` is."""
    if isinstance(value, str):
        return {"levels": [value]}
    return {"levels": value} if isinstance(value, list) else value


def _trackers(value: Any) -> Any:
    """One name is a list of it, and `none` is none, as in transformers' arguments."""
    if isinstance(value, str):
        return [] if value == "none" else [value]
    return value


class TrainingSettings(Section):
    """How long, how fast, and what is kept."""

    epochs: float = Field(3.0, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many steps instead.")
    batch_size: int = Field(16, ge=1, description="Rows per step and device.")
    eval_batch_size: int = Field(
        default_factory=lambda training: training["batch_size"],
        ge=1,
        description="Rows per step and device when evaluating; without it, as in training.",
    )
    gradient_accumulation: int = Field(1, ge=1, description="Batches whose gradients are added.")
    learning_rate: float = Field(3e-4, gt=0, description="Peak learning rate.")
    head_learning_rate_factor: float = Field(
        1.0, gt=0, description="The classification head's learning rate over the adapter's."
    )
    head_learning_rate: float | None = Field(
        None,
        gt=0,
        description="The classification head's learning rate itself, whatever the adapter's, in "
        "place of `head_learning_rate_factor`.",
    )
    level_learning_rate_factors: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Level -> its learning rate over the adapter's, as in `{local: 2}`.",
    )
    b_learning_rate_factor: float = Field(
        1.0, gt=0, description="The learning rate of every B over that of its A (LoRA+: 16)."
    )
    frozen_levels: list[str] | None = Field(
        None, description="Levels that do not train: with `init_from`, they stay as they are there."
    )
    stages: list[Annotated[StageSettings, BeforeValidator(_levels_alone)]] | None = Field(
        None,
        min_length=1,
        description="Levels to train one after the other, as in `[global, mid, local]`; "
        "see [staged training](#staged-training).",
    )
    restart_schedule: bool = Field(
        True, description="With `stages`, each stage goes through the whole schedule and warm-up."
    )
    warmup_ratio: float = Field(0.06, ge=0, lt=1, description="Share of the steps that warm up.")
    optimizer: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "adafactor",
        "sgd",
    ] = Field(
        "adamw_torch",
        description="The optimiser, as transformers calls it; the 8-bit and paged ones need "
        "bitsandbytes.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay; never on biases and norms.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm.")
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"] = (
        Field("linear", description="Shape of the learning rate after the warm-up.")
    )
    logging_steps: int = Field(10, ge=1, description="Steps between two entries of the loss curve.")
    eval_steps: int | None = Field(
        None, ge=1, description="Evaluate and save every so many steps instead of every epoch."
    )
    save_steps: int | None = Field(
        None, ge=1, description="Save every so many steps too, besides at each evaluation."
    )
    save_limit: int = Field(
        2,
        ge=1,
        description="Checkpoints kept while training, beside the best one at the time of each.",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="Stop after this many evaluations in a row without a better one; with "
        "`stages`, in the last stage only.",
    )
    report_to: Annotated[list[Tracker], BeforeValidator(_trackers)] = Field(
        default_factory=list,
        description="Trackers that follow the run, by transformers' integrations.",
    )
    check_saved: bool = Field(
        True,
        description="After training, load the saved adapter and evaluate it once more: it must "
        "give what the run reports.",
    )
    metric_for_best: str | None = Field(
        None,
        description="Metric that picks the checkpoint to keep; unset: accuracy, Matthews for CoLA, "
        "Pearson for regression, loss for sft and dpo.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    completion_only_loss: bool = Field(
        True, description="For sft: the loss counts completions (assistant turns), not prompts."
    )
    packing: bool = Field(False, description="For sft: several rows in one training sequence.")
    group_by_length: bool = Field(
        False, description="Put rows of like length into one batch, which spares padding."
    )
    dpo_beta: float = Field(
        0.1, gt=0, description="For dpo: how strongly the model is held to the reference."
    )
    dpo_loss: PreferenceLoss = Field(
        "sigmoid", description="For dpo: the loss of a pair, by TRL's name; `sigmoid` is DPO's own."
    )


LEVEL_KEYS = ("level_learning_rate_factors", "frozen_levels", "stages")
"""The training keys that mean nothing without a pyramid."""


class DeviceSettings(Section):
    """The processes and devices a run is spread over."""

    processes: int = Field(
        1, ge=1, description="Processes that train together, each on a GPU where there are some."
    )
    strategy: Literal["ddp", "fsdp2", "zero2", "zero3"] = Field(
        "ddp",
        description="How they share the work: each holds the whole model (`ddp`), or they shard it "
        "(`fsdp2`; `zero2` and `zero3` by DeepSpeed).",
    )
    device_map: Literal["auto", "balanced", "sequential"] | None = Field(
        None,
        description="Instead of processes, one that spreads the base's layers over all GPUs and, "
        "where they do not hold it, the CPU's memory.",
    )


TASKS_OF_KEY: dict[str, tuple[Task, ...]] = {
    "data.text_columns": ("classification",),
    "data.image_column": ("image-classification",),
    "data.label_column": ("classification", "image-classification"),
    "data.labels": ("classification", "image-classification"),
    "data.regression": ("classification",),
    "data.columns": ("sft", "dpo"),
    "data.chat_template": ("sft", "dpo"),
    "data.max_length": ("classification", "sft", "dpo"),
    "data.too_long": ("classification", "sft", "dpo"),
    "data.bad_rows": ("classification", "sft", "dpo"),
    "training.head_learning_rate_factor": ("classification", "image-classification"),
    "training.head_learning_rate": ("classification", "image-classification"),
    "training.completion_only_loss": ("sft",),
    "training.packing": ("sft",),
    "training.group_by_length": ("classification", "sft", "dpo"),
    "training.dpo_beta": ("dpo",),
    "training.dpo_loss": ("dpo",),
}
"""The keys that mean nothing to some tasks, and the tasks that read them."""


class Settings(Section):
    """One training run."""

    model: str = Field(description="Hugging Face model id, or folder of a model.")
    task: Task = Field(
        description="`classification` (of texts), `image-classification`, `sft` (supervised "
        "fine-tuning) or `dpo` (preference pairs)."
    )
    output: str = Field(description="The run folder to make.")
    method: Method = Field("msplora", description="What trains: see [methods](#methods).")
    seed: int = Field(
        42, ge=0, lt=2**32, description="Seeds the split, the initialisation and the order."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Of the frozen weights and the arithmetic; what trains is float32. `auto` is "
        "the checkpoint's (float32 instead of float16 where there is no GPU).",
    )
    quantization: Literal["4bit", "8bit"] | None = Field(
        None,
        description="Load the frozen base in so many bits, by bitsandbytes (4bit: NF4, as QLoRA).",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the model on the hub.")
    tokenizer: str | None = Field(
        None,
        description="Id or folder, where it is not the model's; of images, of their processor.",
    )
    trust_remote_code: bool = Field(
        False,
        description="Run Python code that comes with the model. Only if you trust its author.",
    )
    init_from: str | None = Field(
        None, description="Adapter folder (or run folder) of the same method to start from."
    )
    data: DataSettings = Field(default_factory=DataSettings)  # pyright: ignore[reportArgumentType]
    adapter: AdapterSettings = Field(default_factory=AdapterSettings)  # pyright: ignore
    hydra: HydraSettings = Field(default_factory=HydraSettings)  # pyright: ignore
    elalora: ElaLoraSettings = Field(default_factory=ElaLoraSettings)  # pyright: ignore
    gralora: GraLoraSettings = Field(default_factory=GraLoraSettings)  # pyright: ignore
    adalora: AdaLoraSettings = Field(default_factory=AdaLoraSettings)  # pyright: ignore
    vera: VeraSettings = Field(default_factory=VeraSettings)  # pyright: ignore
    randlora: RandLoraSettings = Field(default_factory=RandLoraSettings)  # pyright: ignore
    lily: LilySettings = Field(default_factory=LilySettings)  # pyright: ignore
    devices: DeviceSettings = Field(default_factory=DeviceSettings)  # pyright: ignore
    training: TrainingSettings = Field(default_factory=TrainingSettings)  # pyright: ignore

    @field_validator("data", "adapter", "devices", "training", *METHOD_SECTIONS, mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        """A section whose every key is commented out is there, and holds nothing."""
        return {} if value is None else value

    @property
    def classifies(self) -> bool:
        """Whether a head gives classes (or a number): the model generates nothing."""
        return self.task in ("classification", "image-classification")

    def to_dict(self) -> dict[str, Any]:
        """The resolved settings, as they are written to config.yaml."""
        return self.model_dump(mode="json")
