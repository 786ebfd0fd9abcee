"""Read a run's settings: a YAML file, then flags over it, then checks that need no data."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from msplora.errors import ConfigError, nearest, nearest_path

from .other_names import OTHER_NAMES
from .peft_methods import check_method, takes_bits
from .problems import described, together
from .settings import TASKS_OF_KEY, Settings
from .settings_data import DataSettings, DataSource
from .settings_methods import LORAS, METHOD_SECTIONS

# A GLUE task has files, columns and classes of its own.
_DECIDED_BY_GLUE = ("text_columns", "label_column", "labels", "regression", "validation")

_A_SOURCE = "{path: rows.jsonl, weight: 2}"


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-4` is a number, as in YAML 1.2, and no key stands twice."""


# YAML 1.1 wants a dot and a signed exponent; every learning rate ever written breaks that rule.
_Loader.add_implicit_resolver(
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
        raise ConfigError(_explain(error, source)) from None
    _check(settings, source)
    return settings


def write_settings(settings: Settings, file: Path) -> None:
    """Write the settings so that `read_settings` gives the same again."""
    file.write_text(
        yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )


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


def _explain(error: ValidationError, source: str) -> str:
    return together((_sentence(problem) for problem in error.errors()), source)


def _sentence(problem: Any) -> str:
    # Members of a union and of a list are in the location too; the key is what a file shows.
    path = [str(part) for part in problem["loc"]]
    if path[2:3] == ["one"]:
        return (
            f"{'.'.join(path[:2])} = {problem['input']!r}: it takes a path, or a list of paths "
            f"and of mappings such as {_A_SOURCE}."
        )
    if path[2:3] == ["several"] and path[3:]:
        return _explain_source(".".join(path[:2]), path[3:], problem)
    if problem["type"] == "extra_forbidden":
        return described(problem, ".".join(path), _nearest_key(path))
    if problem["type"] != "missing":
        known = known_keys()
        while len(path) > 1 and ".".join(path) not in known:
            path.pop()
    return described(problem, ".".join(path), _nearest_value(problem))


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


def _check(settings: Settings, source: str) -> None:
    """Refuse combinations that each key alone allows."""
    data = settings.data

    def default(key: str) -> Any:
        return DataSettings.model_fields[key].get_default(call_default_factory=True)

    if not settings.classifies and settings.method == "frozen":
        raise ConfigError(
            f"in {source}: method 'frozen' trains a classifier's head only, and task "
            f"{settings.task!r} has none. Use method msplora, lora or full."
        )
    check_method(settings, source)
    if settings.quantization and not takes_bits(settings.method):
        raise ConfigError(
            f"in {source}: a base in {settings.quantization} trains with an adapter that has "
            f"layers for it, and method {settings.method!r} has none. Use method msplora or lora, "
            f"or leave quantization out."
        )
    if settings.task == "dpo" and settings.adapter.bias != "none":
        raise ConfigError(
            f"in {source}: adapter.bias = {settings.adapter.bias!r} trains biases of the base, and "
            f"task 'dpo' compares with the base as it was. Leave it out."
        )
    unset = Settings(model="", task=settings.task, output="")  # pyright: ignore[reportCallIssue]
    for key, tasks in TASKS_OF_KEY.items():
        value = operator.attrgetter(key)(settings)
        if settings.task not in tasks and value != operator.attrgetter(key)(unset):
            raise ConfigError(
                f"in {source}: {key} = {value!r} is for task {' or '.join(map(repr, tasks))}, and "
                f"the task is {settings.task!r}. Leave it out, or change the task."
            )
    sources = [key for key in ("glue", "train", "hub") if getattr(data, key) is not None]
    if len(sources) != 1:
        found = " and ".join(f"data.{key}" for key in sources) or "none of them"
        raise ConfigError(
            f"in {source}: say where the data is with one of data.glue (with data.path), "
            f"data.train or data.hub; found {found}."
        )
    if data.glue and settings.task != "classification":
        raise ConfigError(
            f"in {source}: data.glue is for task 'classification', not {settings.task!r}."
        )
    if data.glue and not data.path:
        raise ConfigError(
            f"in {source}: data.glue = {data.glue!r} needs data.path, the folder with train.tsv "
            f"and dev.tsv."
        )
    decided = [f"data.{key}" for key in _DECIDED_BY_GLUE if getattr(data, key) != default(key)]
    if data.glue and decided:
        raise ConfigError(
            f"in {source}: data.glue = {data.glue!r} decides {', '.join(decided)} by itself. Leave "
            f"it out, or name the files in data.train and data.validation instead of data.glue."
        )
    if not data.hub and data.validation_split:
        raise ConfigError(
            f"in {source}: data.validation_split is a split of a hub dataset, and there is no "
            f"data.hub. Name a held-out file in data.validation."
        )
    held_out = data.validation if isinstance(data.validation, list) else []
    weighted = [number for number, its in enumerate(held_out, 1) if its.weight != 1]
    if weighted:
        raise ConfigError(
            f"in {source}: data.validation, entry {weighted[0]}: held-out rows are judged once "
            f"each. Leave its weight out."
        )
    if settings.training.packing and settings.training.group_by_length:
        raise ConfigError(
            f"in {source}: training.group_by_length puts rows of like length into a batch, and "
            f"training.packing leaves no rows to group. Leave one out."
        )
    if data.regression and data.labels:
        raise ConfigError(f"in {source}: data.labels names classes, but data.regression is set.")
    if settings.classifies and not has_validation(settings):
        raise ConfigError(
            f"in {source}: a classifier keeps its best epoch, so it needs held-out rows: set "
            f"data.validation, data.validation_split or data.validation_fraction above 0."
        )
    _check_training(settings, source)
    if settings.devices.device_map and settings.devices.processes > 1:
        raise ConfigError(
            f"in {source}: devices.device_map spreads one process's model over all devices, and "
            f"devices.processes = {settings.devices.processes} gives each process one. Choose one."
        )
    if settings.init_from and settings.method not in ("msplora", *LORAS):
        raise ConfigError(
            f"in {source}: init_from starts from an adapter of MSPLoRA or LoRA, and the method is "
            f"{settings.method!r}. Use method msplora or lora."
        )


def _check_training(settings: Settings, source: str) -> None:
    training = settings.training
    frozen = training.frozen_levels or ()
    both = [its for stage in training.stages or () for its in stage.levels if its in frozen]
    if both:
        raise ConfigError(
            f"in {source}: training.frozen_levels and training.stages both name {both[0]}. A level "
            f"that trains in a stage is not frozen: take it out of one of them."
        )
    if training.early_stopping_patience and not has_validation(settings):
        raise ConfigError(
            f"in {source}: training.early_stopping_patience needs held-out rows to judge by: set "
            f"data.validation, data.validation_split or data.validation_fraction above 0."
        )


def has_validation(settings: Settings) -> bool:
    """Whether a run holds rows out to be judged by."""
    data = settings.data
    return bool(data.glue or data.validation or data.validation_split or data.validation_fraction)


def check_metric(settings: Settings, usual: str, known: Iterable[str]) -> str:
    """Return the metric that picks the checkpoint to keep; refuse one the task does not have."""
    wanted = settings.training.metric_for_best or usual
    known = list(known)
    if wanted not in known:
        raise ConfigError(
            f"training.metric_for_best = {wanted!r}; this task has {', '.join(known)}."
            + nearest(wanted, known, count=1)
        )
    return wanted
