"""The tables of keys in docs/training.md and docs/bake-off.md, made from the settings' fields.

`python tests/settings_tables.py` writes them anew; a test compares.
"""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from msplora.bakeoff.settings import BakeOffSettings, ChooseSettings, RejectSettings
from msplora.sweep.settings import SearchSettings, SweepSettings
from msplora.train.settings import (
    AdapterSettings,
    DeviceSettings,
    Settings,
    StageSettings,
    TrainingSettings,
)
from msplora.train.settings_data import DataSettings, DataSource
from msplora.train.settings_methods import METHOD_SECTIONS

PAGE = Path(__file__).resolve().parents[1] / "docs/training.md"
BAKE_OFF = PAGE.with_name("bake-off.md")
SECTIONS: dict[str, type[BaseModel]] = {
    "top level": Settings,
    "data": DataSettings,
    "source": DataSource,
    "adapter": AdapterSettings,
    **METHOD_SECTIONS,
    "training": TrainingSettings,
    "devices": DeviceSettings,
    "a stage": StageSettings,
    "sweep": SweepSettings,
    "a searched key": SearchSettings,
    "bake-off": BakeOffSettings,
    "choosing": ChooseSettings,
    "rejecting": RejectSettings,
}
_MARKED = r"<!-- keys: {} -->\n(.*?)<!-- end of keys -->"


def table(section: type[BaseModel]) -> str:
    """The table of one section: key, what it takes, default, meaning."""
    lines = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        if not is_section(field):
            cells = (f"`{key}`", takes(field), default(field), field.description or "")
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def tables(page: str) -> dict[str, str]:
    """The tables that stand in the page, by section."""
    found = {name: re.search(_MARKED.format(name), page, flags=re.DOTALL) for name in SECTIONS}
    return {name: match.group(1) if match else "" for name, match in found.items()}


def is_section(field: FieldInfo) -> bool:
    """Whether a key holds further keys."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def default(field: FieldInfo) -> str:
    """A default as it would stand in the file."""
    if field.is_required():
        return "required"
    if field.default_factory_takes_validated_data:
        return "another key's"  # its description says which
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def takes(field: FieldInfo) -> str:
    """The kind of value, with its bounds."""
    return _kind(field.annotation) + _bounds(field)


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:  # a value that is brought into form before it is checked
        return _kind(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        kinds = [_kind(its) for its in arguments if its is not type(None)]
        return " or ".join(sorted(kinds, key=lambda kind: kind.startswith("list")))
    if origin is list:
        many = _kind(arguments[0])
        return f"list of {many}" + ("" if many.endswith("`") else "s")
    if origin is dict:
        return "mapping"
    return {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "`true` or `false`",
        DataSource: "source",
        StageSettings: "stage",
        ChooseSettings: "mapping",
        RejectSettings: "mapping",
    }[annotation]


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = []
    for constraint in field.metadata:
        for name, sign in signs.items():
            bound = getattr(constraint, name, None)
            if bound is not None:
                found.append(f"{sign} {bound:{'g' if isinstance(bound, float) else ','}}")
    return f" {' and '.join(found)}" if found else ""


def rewrite() -> None:
    """Put the tables of the present fields into the pages."""
    for file in (PAGE, BAKE_OFF):
        page = file.read_text(encoding="utf-8")
        for name, section in SECTIONS.items():
            new = f"<!-- keys: {name} -->\n{table(section)}<!-- end of keys -->"
            page = re.sub(_MARKED.format(name), lambda _, new=new: new, page, flags=re.DOTALL)
        file.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    rewrite()
