"""Read a run's settings: a YAML file, then flags over it, then checks that need no data."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from msplora.errors import ConfigError, nearest, nearest_path
from msplora.recipes import recipes

from .other_names import OTHER_NAMES
from .problems import described, together
from .settings import Settings, StageSettings
from .settings_checks import check_together
from .settings_data import DataSource
from .settings_methods import METHOD_SECTIONS

_A_SOURCE = "{path: rows.jsonl, weight: 2}"


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-4` is a number, as in YAML 1.2, and no key stands twice."""


class _Dumper(yaml.SafeDumper):
    """What `_Loader` reads as it was: a word such as `1e-4` in quotes."""


# YAML 1.1 wants a dot and a signed exponent; every learning rate ever written breaks that rule.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(
                problem="a key must be a word, not a list or a mapping",
                problem_mark=key_node.start_mark,
            )
        key, line = key_node.value, key_node.start_mark.line + 1
        if key in seen:
            raise yaml.MarkedYAMLError(
                problem=f"the key {key!r} stands twice, in lines {seen[key]} and {line}"
            )
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_settings(
    file: Path | str,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """Return the settings of `file`, changed by `overrides` ("dotted.key=value") and `flags`.

    Paths in the file are relative to the folder the command runs in, as paths on the command line
    are.

    Raises:
        ConfigError: the file cannot be read, or says something no run can do.
    """
    content = read_content(file)
    source = overridden(content, overrides, str(file))
    for key, value in (flags or {}).items():
        if value is not None:
            content[key] = value
    return make_settings(content, source)


def read_content(
    file: Path | str, needs: str = "at least model, task, output and data"
) -> dict[str, Any]:
    """Return what a YAML file holds, unchecked; `needs` says what one that is empty lacks.

    Raises:
        ConfigError: there is no such file, or it is no mapping in YAML.
    """
    file = Path(file)
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; give the path of the YAML file in it.")
    if not file.is_file():
        name = str(file).removesuffix(".yaml")
        if any(recipe.name == name for recipe in recipes()):
            raise ConfigError(
                f"the config file {file} does not exist, but there is a recipe of that name. Make "
                f"it a file of your own with: msplora recipes copy {name}"
            )
        hint = nearest_path(file, "*.y*ml") or " Give the path of a YAML file."
        raise ConfigError(f"the config file {file} does not exist.{hint}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}). Convert it first."
        ) from None
    content = _parse(text, str(file))
    if content is None:
        raise ConfigError(f"{file} is empty; it needs {needs}.")
    if not isinstance(content, dict):
        raise ConfigError(
            f"{file} holds a {type(content).__name__}; a config is a mapping of keys to values."
        )
    return content


def make_settings(content: Mapping[str, Any], source: str) -> Settings:
    """Return typed, checked settings; `source` names where `content` came from in errors."""
    try:
        settings = Settings.model_validate(dict(content))
    except ValidationError as error:
        raise ConfigError(_explain(error, source, content)) from None
    check_together(settings, source)
    return settings


def write_settings(settings: Settings, file: Path) -> None:
    """Write the settings so that `read_settings` gives the same again."""
    file.write_text(as_yaml(settings.to_dict()), encoding="utf-8")


def as_yaml(content: Mapping[str, Any]) -> str:
    """The text of a YAML file in which `read_content` finds the same content."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def known_keys(model: type[BaseModel] = Settings, prefix: str = "") -> list[str]:
    """Every dotted key of a config, sections before what they hold."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def overridden(content: dict[str, Any], changes: Iterable[str], source: str) -> str:
    """Change a config's content as each "dotted.key=value" says, the value in YAML.

    Returns:
        what the content is now from, for messages.
    """
    changes = list(changes)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"--set takes key=value, as in training.learning_rate=1e-4; found {change!r}."
            )
        put(content, key, _parse(text, f"--set {change}"), f"--set {change}")
    return f"{source} with --set" if changes else source


def put(content: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set a dotted key in a config's content, with the sections above it; `source` as above."""
    *sections, last = key.split(".")
    place = content
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise ConfigError(f"{source}: {section!r} is a value, not a section.")
    place[last] = value


def _explain(error: ValidationError, source: str, content: Mapping[str, Any]) -> str:
    # A default that follows another key is wrong only where that key is.
    problems = (its for its in error.errors() if its["type"] != "default_factory_not_called")
    return together((_sentence(problem, content) for problem in problems), source)


def _sentence(problem: Any, content: Mapping[str, Any]) -> str:
    path = [str(part) for part in problem["loc"]]
    if path[2:3] == ["one"]:
        return (
            f"{'.'.join(path[:2])} = {problem['input']!r}: it takes a path, or a list of paths "
            f"and of mappings such as {_A_SOURCE}."
        )
    if path[2:3] == ["several"] and path[3:]:
        return _explain_source(".".join(path[:2]), path[3:], problem)
    key = _key_as_written(problem["loc"], content)
    if problem["type"] == "missing":
        return described(problem, f"{key}.{path[-1]}".lstrip("."))
    if problem["type"] == "extra_forbidden":
        return described(problem, key or path[-1], _nearest_key(path))
    return described(problem, key or path[-1], _nearest_value(problem))


def _key_as_written(location: Iterable[str | int], content: Any) -> str:
    """The key as the file shows it, such as `training.stages[0].share`.

    Members of a union are in the location, too; what is not in the content is left out.
    """
    key = ""
    for part in location:
        if isinstance(content, Mapping) and part in content:
            key, content = f"{key}.{part}".lstrip("."), content[part]
        elif isinstance(content, list) and isinstance(part, int) and part < len(content):
            key, content = f"{key}[{part}]", content[part]
    return key


def _explain_source(key: str, entry: list[str], problem: Any) -> str:
    """What is wrong with an entry of a list of sources; entries are counted from one."""
    place, *inside = entry
    where = f"{key}, entry {int(place) + 1}"
    if problem["type"] == "model_type":
        return f"{where} = {problem['input']!r}: it takes a path or a mapping such as {_A_SOURCE}."
    if not inside:
        return described(problem, where)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key {inside[0]!r}." + (
            nearest(inside[0], DataSource.model_fields, count=1)
            or f" Known here: {', '.join(DataSource.model_fields)}."
        )
    return described(problem, f"{where}: {inside[0]}")


def _nearest_key(path: list[str]) -> str:
    """The key that was meant: the same word in another section, or a similar one in this."""
    section, name = ".".join(path[:-1]), path[-1]
    if section.startswith("training.stages."):
        return nearest(name, StageSettings.model_fields, count=1) or (
            f" Known here: {', '.join(StageSettings.model_fields)}."
        )
    # Sections of methods have keys that look like others', and like each other's: they come last.
    known = [key for key in known_keys() if _method_of(key) in (None, section)]
    elsewhere = [key for key in known if key.rpartition(".")[2] == name]
    if elsewhere:
        return f" Did you mean {elsewhere[0]!r}?"
    if name in OTHER_NAMES:
        return f" Here that is {OTHER_NAMES[name]!r}."
    of_methods = [key for key in known_keys() if key.rpartition(".")[2] == name]
    if of_methods:
        return f" Did you mean {of_methods[0]!r}?"
    # By the last part alone: under one long section every key looks like every other.
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    everywhere = {key.rpartition(".")[2]: key for key in known}
    for candidates, cutoff in ((siblings, 0.75), (everywhere, 0.75), (siblings, 0.5)):
        near = difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff)
        if near:
            return f" Did you mean {candidates[near[0]]!r}?"
    return f" Known here: {', '.join(siblings)}."


def _method_of(key: str) -> str | None:
    """The method in whose section a key stands."""
    section, _, inside = key.partition(".")
    return section if inside and section in METHOD_SECTIONS else None


def _nearest_value(problem: Any) -> str:
    if isinstance(problem["input"], bool) and problem["type"] == "string_type":
        return " YAML reads yes, no, on and off as true and false: put them in quotes."
    if problem["type"] != "literal_error" or not isinstance(problem["input"], str):
        return ""
    allowed = re.findall(r"'([^']+)'", str(problem.get("ctx", {}).get("expected", "")))
    return nearest(problem["input"], allowed, count=1)
