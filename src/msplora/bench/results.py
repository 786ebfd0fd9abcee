"""A result file: where its rows come from, and the rows. Written whole, after every point.

    {"kind": "speed", "command": …, "commit": …, "hardware": …, "versions": {…}, "threads": 2,
     "rows": [{…}, …]}

A file is never overwritten by accident, and never mixes what was measured in different ways.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msplora.errors import MSPLoraError

KINDS = ("speed", "memory", "sites", "size")
# Rows in one file agree in all of these. The command may differ: an interrupted sweep goes on.
_SAME = ("kind", "commit", "hardware", "versions", "threads")

Row = dict[str, Any]


def read(path: str | Path) -> dict[str, Any]:
    """Return a result file's content.

    Raises:
        MSPLoraError: it is not there, or is no result file.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MSPLoraError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MSPLoraError(f"{path} is not a result file of `msplora bench`: {error}") from None
    known = isinstance(content, dict) and content.get("kind") in KINDS
    if not known or not isinstance(content.get("rows"), list):
        raise MSPLoraError(
            f"{path} is not a result file of `msplora bench`: it has no kind ({', '.join(KINDS)}) "
            f"with rows."
        )
    return content


def write(
    path: str | Path,
    kind: str,
    rows: Sequence[Row],
    *,
    header: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> None:
    """Write a result file, beside its place and then into it: a reader never sees half of one.

    Args:
        path: the file; its folder is made. Replaced if it is there: `check` is who refuses.
        kind: one of `KINDS`.
        rows: all rows of the file.
        header: what `make_header` returned at the start; made now if left out.
        device: "cpu" or "cuda", for the hardware's name.

    Raises:
        MSPLoraError: it cannot be written.
    """
    path = Path(path)
    header = header or make_header(kind, device)
    content = json.dumps({**header, "kind": kind, "rows": list(rows)}, indent=1) + "\n"
    beside = path.with_name(f"{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(content, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise MSPLoraError(f"{path} cannot be written: {error.strerror or error}.") from error


def make_header(kind: str, device: str | None = None) -> dict[str, Any]:
    """Kind, command, commit, hardware, versions and threads of this process."""
    import torch

    from .provenance import provenance

    return {"kind": kind, **provenance(device), "threads": torch.get_num_threads()}


def check(path: Path | None, *, append: bool = False, force: bool = False) -> None:
    """Refuse an output that cannot or must not be written, before anything is measured."""
    if path is None:
        if append or force:
            raise MSPLoraError("--append and --force are about --output, which was not given.")
        return
    if append and force:
        raise MSPLoraError("--append keeps what is in the file and --force replaces it: say one.")
    blocked = next((its for its in path.parents if its.exists() and not its.is_dir()), None)
    if blocked:
        raise MSPLoraError(f"{path} cannot be written: {blocked} is not a folder.")
    if path.is_dir():
        raise MSPLoraError(f"{path} is a folder; --output takes a file, such as {path}/speed.json.")
    folder = next((its for its in path.parents if its.exists()), Path())
    if not os.access(folder, os.W_OK):
        raise MSPLoraError(
            f"{path} cannot be written: nothing may be added to {folder}. Name another file."
        )
    if path.exists() and not (append or force):
        raise MSPLoraError(
            f"{path} is there already. Continue it with --append, replace it with --force, or name "
            f"another file."
        )


class ResultFile:
    """The rows of a sweep, and the file (if any) that is written again after every point."""

    def __init__(
        self,
        path: Path | None,
        kind: str,
        *,
        append: bool = False,
        force: bool = False,
        device: str | None = None,
    ) -> None:
        """Start a file, or go on with one.

        Raises:
            MSPLoraError: it exists and neither may be replaced nor continued.
        """
        check(path, append=append, force=force)
        self.path = path
        self.header = make_header(kind, device)
        self.rows: list[Row] = []
        if append and path is not None and path.exists():
            self._continue(read(path))

    def _continue(self, found: dict[str, Any]) -> None:
        if self.header["commit"].endswith("-dirty"):
            raise MSPLoraError(
                f"{self.path} cannot be continued: the code here is {self.header['commit']}, and "
                f"changes that are not committed cannot be told from earlier ones. Commit, and "
                f"write another file, or replace this one with --force."
            )
        unlike = [key for key in _SAME if found.get(key) != self.header[key]]
        if unlike:
            told = "; ".join(
                f"{key} is {found.get(key)!r} there and {self.header[key]!r} here" for key in unlike
            )
            raise MSPLoraError(
                f"{self.path} cannot be continued, since its rows could not be compared with new "
                f"ones: {told}. Write another file, or replace this one with --force."
            )
        self.rows = list(found["rows"])
        commands = str(found.get("command", "")).split(" && ")
        if self.header["command"] not in commands:
            commands.append(self.header["command"])
        self.header["command"] = " && ".join(commands)

    def holds(self, keys: Mapping[str, Any], methods: Iterable[str], **same: Any) -> bool:
        """Whether a point is in the file already.

        Args:
            keys: what the point is, as in its rows.
            methods: the methods asked for.
            same: what else its rows must have been measured with, such as `rounds`.

        Raises:
            MSPLoraError: the point is there with other methods, or measured in another way:
                methods are compared within a round, so they cannot be added to one by one.
        """
        there = [row for row in self.rows if all(row.get(key) == keys[key] for key in keys)]
        if not there:
            return False
        named = ", ".join(f"{key} {value}" for key, value in keys.items())
        missing = set(methods) - {row["method"] for row in there}
        if missing:
            raise MSPLoraError(
                f"{self.path} has the point {named} without {', '.join(sorted(missing))}. Methods "
                f"are measured together: write another file, or replace this one with --force."
            )
        for key, value in same.items():
            found = {row.get(key) for row in there}
            if found != {value}:
                raise MSPLoraError(
                    f"{self.path} has the point {named} with {key} {sorted(found, key=str)}, asked "
                    f"for is {value}. Write another file, or replace this one with --force."
                )
        return True

    def add(self, rows: Iterable[Row]) -> None:
        """Add a point's rows and write the file."""
        self.rows += rows
        if self.path is not None:
            write(self.path, self.header["kind"], self.rows, header=self.header)
