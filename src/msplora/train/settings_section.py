"""What every section of a run's config has in common."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A mapping of the file whose keys are all known, and whose numbers are numbers."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false, and what YAML takes for them, which Python counts as 1 and 0."""
        if isinstance(value, bool) and info.field_name:
            types = _types_in(cls.model_fields[info.field_name].annotation)
            if types & {int, float} and bool not in types:
                raise ValueError(f"a number belongs here, and {str(value).lower()} is none")
        return value


def _types_in(annotation: Any) -> set[Any]:
    """All types of a union, at any depth."""
    inner = get_args(annotation)
    return set().union(*map(_types_in, inner)) if inner else {annotation}
