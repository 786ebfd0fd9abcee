"""Fetch PEFT's own tests, of the release that is installed, into a folder outside the repository.

Its source package has them, its wheel has not. Nothing of theirs is kept in our repository.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


def fetch(folder: Path, source: Path | None = None) -> str:
    """Put `tests/` of PEFT into `folder`, if it is not there, and say where it is from.

    Args:
        folder: is made; `folder/tests` will be a package.
        source: a checkout of PEFT's repository, to be used in place of the source package.

    Raises:
        SystemExit: there is no source package, or it has no tests.
    """
    origin = folder / "origin.txt"
    if origin.is_file():
        return origin.read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    if source is None:
        said = _from_registry(folder)
    else:
        _copy(source / "tests", folder)
        said = f"a checkout, {source.name}"
    if importlib.util.find_spec("attr") is None:  # which PEFT imports and does not declare
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([sys.executable, *install, str(folder / "packages"), "attrs"], check=True)
    (folder / "tests" / "__init__.py").touch()  # they import from each other relatively
    origin.write_text(said, encoding="utf-8")
    return said


def _from_registry(folder: Path) -> str:
    version = importlib.metadata.version("peft")
    with tempfile.TemporaryDirectory() as temporary:
        command = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run(
            [sys.executable, *command, "--no-build-isolation", f"peft=={version}"],
            check=True,
            cwd=temporary,
        )
        archive = next(Path(temporary).glob("peft-*.tar.gz"))
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()[:16]
        with tarfile.open(archive) as packed:
            packed.extractall(temporary, filter="data")
        _copy(Path(temporary) / f"peft-{version}" / "tests", folder)
    return f"the source package peft-{version}.tar.gz (sha256 starts {digest})"


def _copy(tests: Path, folder: Path) -> None:
    if not (tests / "test_custom_models.py").is_file():
        raise SystemExit(
            f"{tests} has no tests of PEFT. Check out its repository at the release that is "
            f"installed, and give its folder with --peft."
        )
    shutil.copytree(tests, folder / "tests", dirs_exist_ok=True)
