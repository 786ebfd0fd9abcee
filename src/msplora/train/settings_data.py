"""The `data` section of a run's config: where the rows come from, and what becomes of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from msplora.errors import nearest

from .settings_section import Section

GlueTask = Literal["mrpc", "cola", "rte", "sst2", "qnli", "stsb"]

BadRowsPolicy = Literal["error", "drop"]


def _name_of_class(value: Any) -> Any:
    """YAML reads the classes 0 and 1 as numbers; they are names all the same."""
    return str(value) if type(value) in (int, float) else value


ClassName = Annotated[str, BeforeValidator(_name_of_class)]


FIELDS = (
    "text",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "messages",
    "conversations",
    "tools",
    "chat_template_kwargs",
    "chosen",
    "rejected",
)
"""All that the rows of a language model may hold, by the names that `columns` gives to columns."""


def _known_fields(columns: dict[str, str]) -> dict[str, str]:
    for name in columns:
        if name not in FIELDS:  # its column would be read by nobody
            raise ValueError(
                f"it names {name!r}, which is a field of no form.{nearest(name, FIELDS, 1)} Fields "
                f"are {', '.join(FIELDS)}"
            )
    return columns


Columns = Annotated[dict[str, str], AfterValidator(_known_fields)]


class DataSource(Section):
    """One of several sources of rows; a bare path stands for a source of that path alone."""

    path: str | None = Field(
        default=None, description="A file, or a pattern such as `rows/*.jsonl`."
    )
    hub: str | None = Field(
        default=None, description="Instead: id of a dataset on the Hugging Face hub."
    )
    config: str | None = Field(default=None, description="Configuration of the hub dataset.")
    revision: str | None = Field(default=None, description="Revision of the hub dataset.")
    split: str = Field(default="train", description="Split of the hub dataset.")
    weight: float = Field(
        default=1.0,
        gt=0.0,
        allow_inf_nan=False,
        description="How often an epoch sees each of its training rows: 2 twice, 0.5 a half of "
        "them, drawn once by the seed.",
    )
    columns: Columns | None = Field(
        default=None, description="In place of `data.columns`, for this source."
    )

    @model_validator(mode="before")
    @classmethod
    def _bare_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_place(self) -> DataSource:
        if (self.path is None) == (self.hub is None):
            raise ValueError("it needs one of path and hub")
        of_hub = {"config", "revision", "split"} & self.model_fields_set
        if self.path is not None and of_hub:
            raise ValueError(f"{', '.join(sorted(of_hub))} is for a hub dataset, and path a file")
        return self

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> Any:
        """As one would write it: what is set, and a path alone as that."""
        content = {key: value for key, value in handler(self).items() if value is not None}
        unset = ["split"] * (self.hub is None) + ["weight"] * (self.weight == 1)
        content = {key: value for key, value in content.items() if key not in unset}
        return content["path"] if list(content) == ["path"] else content


def _one_or_several(value: Any) -> str:
    return "several" if isinstance(value, (list, tuple)) else "one"


Sources = Annotated[
    Annotated[str, Tag("one")] | Annotated[list[DataSource], Tag("several"), Field(min_length=1)],
    Discriminator(_one_or_several),
]


class DataSettings(Section):
    """Where the rows come from, which columns hold what, and how long a row may be."""

    glue: GlueTask | None = Field(
        None, description="A GLUE task by name; `path` is then the folder with its official TSVs."
    )
    path: str | None = Field(None, description="Folder that holds `train.tsv` and `dev.tsv`.")
    train: Sources | None = Field(
        None,
        description="Training file: .tsv, .csv, .jsonl, .json, .parquet, and for sft also .txt; "
        "all but .parquet also with .gz after it. A pattern such as `rows/*.jsonl`, or a list of "
        "sources, for several. For images also a folder with a folder of images for each class.",
    )
    validation: Sources | None = Field(
        None,
        description="Held-out file, a pattern or a list of sources; of images also a folder.",
    )
    hub: str | None = Field(None, description="Id of a dataset on the Hugging Face hub.")
    hub_config: str | None = Field(None, description="Configuration of the hub dataset.")
    hub_revision: str | None = Field(None, description="Revision of the hub dataset.")
    train_split: str = Field("train", description="Split of the hub dataset to train on.")
    validation_split: str | None = Field(None, description="Its held-out split.")
    validation_fraction: float = Field(
        0.1,
        ge=0.0,
        lt=1.0,
        description="Share of the training rows held out where no validation data is named; "
        "0 holds out nothing (not for a classifier).",
    )
    text_columns: list[str] | None = Field(
        None,
        min_length=1,
        max_length=2,
        description="One or two columns of text to classify; usual names are found by themselves.",
    )
    image_column: str = Field(
        "image", description="Column of the image: a path, relative to the table, or an image."
    )
    label_column: str = Field("label", description="Column of the label.")
    labels: list[ClassName] | None = Field(
        None,
        min_length=2,
        description="The classes, in order; those of the training rows if unset.",
    )
    regression: bool = Field(False, description="Labels are numbers to predict, not classes.")
    columns: Columns = Field(
        default_factory=dict,
        description="For sft and dpo: field of the form -> column of the file, as in "
        "`{prompt: question, completion: answer}`.",
    )
    chat_template: str | None = Field(
        None, description="Jinja file with a chat template, for a tokenizer that has none."
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="Tokens a row may have; unset, as many as the model has positions. For .txt, "
        "the length of a chunk (unset: 256).",
    )
    too_long: Literal["truncate", "drop", "error"] = Field(
        "truncate",
        description="What happens to a row beyond `max_length`; how many is reported. A row beyond "
        "the model's positions is always an error where `max_length` is unset.",
    )
    bad_rows: BadRowsPolicy = Field(
        "error",
        description="What happens to a row that cannot be used, such as one with a null for its "
        "text or a chat that the template refuses: an error that names it, or it is counted and "
        "left out.",
    )
    max_rows: int | None = Field(
        None, ge=1, description="Use only the first rows of each split and source, for a quick try."
    )

    @field_validator("labels")
    @classmethod
    def _each_once(cls, labels: list[str] | None) -> list[str] | None:
        twice = sorted({name for name in labels or [] if (labels or []).count(name) > 1})
        if twice:
            raise ValueError(f"it names {', '.join(map(repr, twice))} more than once")
        return labels
