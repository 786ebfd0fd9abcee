"""Complete configs to start from, one YAML file each in this folder, named model-task-hardware.

The comment at the head of a recipe says what it is and what to expect of it:

    # A title, on one line.
    #
    # Needs:    what has to be there
    # Expected: the result
    # Time:     how long it takes, and on what
    # Memory:   at the peak

and then, after an empty line of comment, whatever else there is to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from msplora.errors import ConfigError, nearest

FACTS = ("Needs", "Expected", "Time", "Memory")
"""What every head says."""


@dataclass(frozen=True)
class Recipe:
    """A config, and what its head says of it."""

    name: str
    title: str
    facts: dict[str, str]
    text: str


def recipes() -> list[Recipe]:
    """Every recipe, by name."""
    folder = resources.files(__name__)
    files = sorted((its for its in folder.iterdir() if its.name.endswith(".yaml")), key=_name)
    return [parse(_name(file), file.read_text(encoding="utf-8")) for file in files]


def find(name: str) -> Recipe:
    """Return a recipe by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    by_name = {recipe.name: recipe for recipe in recipes()}
    name = name.removesuffix(".yaml")
    if name not in by_name:
        raise ConfigError(
            f"there is no recipe {name!r}.{nearest(name, by_name)} All of them: msplora recipes."
        )
    return by_name[name]


def copy(name: str, to: Path | str | None = None) -> Path:
    """Write a recipe to `to`, a file or a folder (here, if left out); return the file.

    Raises:
        ConfigError: there is no such recipe, a file is there already, or it cannot be written.
    """
    recipe = find(name)
    file = Path(to or ".")
    if file.is_dir():
        file = file / f"{recipe.name}.yaml"
    if file.exists():
        raise ConfigError(f"{file} exists, and is not overwritten. Name another file.")
    if not file.parent.is_dir():
        raise ConfigError(f"{file.parent} is no folder, so {file} cannot be written in it.")
    try:
        file.write_text(recipe.text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} could not be written: {error}. Name another file.") from None
    return file


def parse(name: str, text: str) -> Recipe:
    """Read a recipe's head.

    Raises:
        ValueError: it lacks the title or one of the facts.
    """
    head = re.match(r"(?:#.*\n)+", text)
    lines = [line[1:].strip() for line in head.group().splitlines()] if head else []
    title, *rest = lines or [""]
    facts: dict[str, str] = {}
    for line in rest[1:]:
        if not line:
            break
        key, colon, value = line.partition(":")
        if colon and key in FACTS:
            facts[key] = value.strip()
        elif facts:  # it goes on
            facts[list(facts)[-1]] += f" {line}"
    if not title or tuple(facts) != FACTS:
        raise ValueError(f"the head of recipe {name} says {list(facts)}, not {list(FACTS)}")
    return Recipe(name, title, facts, text)


def _name(file: object) -> str:
    return str(getattr(file, "name", "")).removesuffix(".yaml")
